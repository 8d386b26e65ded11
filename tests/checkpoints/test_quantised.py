"""Quantised checkpoints that transformers makes full precision of are read, pruned and saved so; others are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MIXTURES, random_tokens, tiny_model
from tiny_pruning import FFN
from transformers import AutoModelForCausalLM

from fasp_lightning import FaspError, FASPPruner, load_model, save_pruned

BLOCK = 16
FOURS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What 4 bits of MXFP4 stand for."""


def stored(folder: Path, name: str, settings: dict[str, object]) -> dict[str, torch.Tensor]:
    """Save a tiny model as one that is quantised; returns its weights, which the test writes again."""
    tiny_model(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return load_file(folder / "model.safetensors")


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    """A llama of 8 bits with a scale for each 16 x 16 block; returns what its weights stand for."""
    given = stored(folder, "llama", {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    written, meant = dict(given), dict(given)
    for name in (name for name in given if name.endswith("proj.weight")):
        rows, columns = given[name].shape
        blocks = given[name].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (packed.float() * scale[:, None, :, None]).reshape(rows, columns)
        written |= {name: packed.reshape(rows, columns), f"{name}_scale_inv": scale}
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    return meant


def mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A gpt_oss whose experts have 4 bits, and an exponent for each 32 of them; returns what its weights stand for."""
    tiny = replace(MIXTURES["gpt_oss"], options=MIXTURES["gpt_oss"].options | {"intermediate_size": 64})
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MIXTURES, "gpt_oss", tiny)
        given = stored(folder, "gpt_oss", {"quant_method": "mxfp4"})
    written, meant = dict(given), dict(given)
    made = torch.Generator().manual_seed(0)
    for name in (name for name in given if name.endswith(("gate_up_proj", "down_proj"))):
        experts, inputs, outputs = given[name].shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=made)
        exponents = torch.randint(122, 126, codes.shape[:-1], generator=made)
        values = FOURS[codes] * 2.0 ** (exponents[..., None] - 127)
        meant[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
        packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        written |= {f"{name}_blocks": packed, f"{name}_scales": exponents.to(torch.uint8)}
        del written[name]
    whole = {key: value.contiguous() for key, value in written.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return meant


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_what_it_stands_for_is_read_pruned_and_saved(make, tmp_path: Path) -> None:
    meant = make(tmp_path / "q")
    model = load_model(tmp_path / "q", dtype="float32")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, meant[name], atol=1e-6, rtol=1e-2)  # made by way of bfloat16
    FASPPruner(FFN).prune(model, [random_tokens(8, 40)])
    save_pruned(model, tmp_path / "p")
    report = json.loads((tmp_path / "p" / "fasp_report.json").read_text())
    assert report["saved"]["dequantized_from"] == make.__name__
    assert "quantization_config" not in json.loads((tmp_path / "p" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32)
    tokens = random_tokens()
    torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)


def test_what_transformers_needs_another_package_for_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "llama", {"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(FaspError, match=r"is quantised \(bitsandbytes\).*fp8 and mxfp4 alone"):
        load_model(tmp_path)
