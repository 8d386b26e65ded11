"""A model is stored in the dtype of the checkpoint it came from, whatever the device computes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_tokens
from tiny_pruning import BOTH, FFN, pruned

from fasp_lightning import FASPPruner, load_model, load_pruned, save_pruned
from fasp_lightning.checkpoints.devices import choose_stored
from fasp_lightning.checkpoints.source import resolve_source, stored_bytes
from fasp_lightning.training.modeling.export import export_model

Folder = Callable[..., Path]
HALVES = [torch.float16, torch.bfloat16]


def stored(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_checkpoint_does_not_grow_by_being_pruned(dtype: torch.dtype, tiny_folder: Folder, tmp_path: Path) -> None:
    source = tiny_folder("llama-gqa", dtype=dtype)
    model = load_model(source, dtype="float32")
    FASPPruner(BOTH).prune(model, [random_tokens(4, 12)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for form in ("compact", "zero_filled"):
        saved = save_pruned(model, tmp_path / form, form=form)
        assert stored(saved.path) == {dtype}
        assert saved.logit_difference < 1e-4  # the rounding is no difference
        assert load_pruned(saved.path).dtype == dtype
        assert stored_bytes(resolve_source(saved.path)) <= stored_bytes(resolve_source(source))
        torch.testing.assert_close(load_pruned(saved.path).lm_head.weight, model.lm_head.weight.to(dtype))
        again = save_pruned(load_pruned(saved.path, dtype="float32"), tmp_path / f"{form} again", form=form)
        assert stored(again.path) == {dtype}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dense_model_is_exported_in_its_checkpoints_dtype(tiny_folder: Folder, tmp_path: Path) -> None:
    model = load_model(tiny_folder("llama", dtype=torch.bfloat16), dtype="float32")
    export_model(model, tmp_path / "out")
    assert stored(tmp_path / "out") == {torch.bfloat16}
    export_model(model, tmp_path / "other", dtype="float32")
    assert stored(tmp_path / "other") == {torch.float32}


def test_a_model_from_elsewhere_is_stored_as_it_is(tmp_path: Path) -> None:
    assert stored(save_pruned(pruned(config=FFN), tmp_path / "p").path) == {torch.float32}
    assert stored(save_pruned(pruned(config=FFN), tmp_path / "q", dtype="bf16").path) == {torch.bfloat16}


def test_values_that_a_dtype_does_not_reach_keep_the_models_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pruned(config=FFN)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    saved = save_pruned(model, tmp_path / "p", dtype="float16")
    assert stored(saved.path) == {torch.float32}
    assert load_pruned(saved.path).dtype == torch.float32
    assert "model.norm.weight has values that are too large for torch.float16" in caplog.text


def test_the_stored_dtype_follows_the_checkpoint_unless_the_model_is_narrower() -> None:
    assert choose_stored("auto", torch.bfloat16, torch.float32) == torch.bfloat16
    assert choose_stored("auto", torch.float32, torch.bfloat16) == torch.bfloat16
    assert choose_stored("auto", None, torch.float32) == torch.float32
    assert choose_stored("float32", torch.bfloat16, torch.float16) == torch.float32
