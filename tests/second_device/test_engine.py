"""What the engine does on another device is what it does on the CPU, wherever the model and its samples lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, INGREDIENTS, assert_same, basic, calibration, leftovers, pruned
from torch import nn

from fasp_lightning import FASPPruner, PruningConfig, load_pruned, perplexity, save_pruned
from fasp_lightning.pruning.own_text.writing import own_text

SETTINGS: dict[str, PruningConfig] = {
    "both": BOTH,
    "ffn": FFN,
    "kv_groups": basic(attention="kv_groups"),
    "no restoration": replace(BOTH, restoration="none"),
    "free heads": replace(BOTH, head_balance="free"),
    "micro batches": replace(BOTH, micro_batch_size=1),
    **INGREDIENTS,
}
TOLERANCE = 1e-3


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.sampled
@pytest.mark.parametrize("offload", ["cpu", "accelerator", "disk"])
@pytest.mark.parametrize("home", ["second", "cpu"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_pruning_is_that_on_the_cpu(settings: str, home: str, offload: str, second: torch.device) -> None:
    """The model lies there, or on the CPU and goes there block by block."""
    config, name = SETTINGS[settings], "llama-gqa" if settings == "kv_groups" else "llama"
    model = tiny_model(name).to(home)
    report = FASPPruner(replace(config, offload=offload, device=second.type)).prune(model, calibration())
    assert places(model) == {home}
    assert leftovers(model) == []
    assert report.peak_memory["second"] > 0
    assert_same(model.cpu(), pruned(name, config), TOLERANCE)


@pytest.mark.sampled
@pytest.mark.parametrize("score", ["wanda", "fisher"])
@pytest.mark.parametrize("family", TINY)
def test_every_family_is_pruned_as_on_the_cpu(family: str, score: str, second: torch.device) -> None:
    config = replace(BOTH, score=score)
    model = tiny_model(family).to(second)
    FASPPruner(config).prune(model, calibration())
    assert_same(model.cpu(), pruned(family, config), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_stays(dtype: torch.dtype, second: torch.device) -> None:
    model, same = tiny_model("llama-gqa", dtype=dtype).to(second), tiny_model("llama-gqa", dtype=dtype)
    found, wanted = (FASPPruner(BOTH).prune(each, calibration()) for each in (model, same))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for ours, theirs in zip(found.pairs, wanted.pairs, strict=True):
        assert ours.error_after == pytest.approx(theirs.error_after, rel=0.1), ours.layer


def test_block_returns_after_an_exception(second: torch.device) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations must be finite"):
        FASPPruner(basic(device=str(second))).prune(model, calibration())
    assert places(model) == {"cpu"}


def test_own_text_is_that_of_the_cpu(second: torch.device) -> None:
    config: Any = INGREDIENTS["own-text"].own_text
    found, wanted = (own_text(tiny_model("llama").to(device), config) for device in (second, "cpu"))
    assert len(found) == len(wanted)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_perplexity_is_that_of_the_cpu(second: torch.device) -> None:
    batches = [random_tokens(seed=seed) for seed in range(3)]
    model = tiny_model("llama")
    expected = perplexity(model, batches)
    assert perplexity(model.to(second), batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["compact", "zero_filled"])
def test_model_is_saved_from_there_and_loaded(form: str, tmp_path: Any, second: torch.device) -> None:
    model = tiny_model("opt").to(second)
    FASPPruner(BOTH).prune(model, calibration())
    save_pruned(model, tmp_path / "out", form=form)
    assert places(model) == {"second"}
    loaded, ids = load_pruned(tmp_path / "out").to(second), random_tokens().to(second)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_tensors_of_two_devices_do_not_meet(second: torch.device) -> None:
    """The device refuses what an accelerator refuses; else the other tests would say nothing."""
    with pytest.raises(RuntimeError, match=r"two devices|on one device"):
        torch.ones(3, device=second) + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"two devices|on one device"):
        torch.nn.functional.embedding(torch.ones(2, dtype=torch.long), torch.ones(3, 4, device=second))
    assert (torch.ones(3, device=second) + torch.tensor(1.0)).tolist() == [2, 2, 2]  # numbers may
