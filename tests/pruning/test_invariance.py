"""The outcome does not depend on where and in which pieces it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, assert_same, basic, calibration, pruned
from torch import nn

from fasp_lightning import FASPPruner


def test_same_seed_same_plan() -> None:
    first = pruned("gemma3")
    torch.manual_seed(123)
    assert_same(first, pruned("gemma3"))


@pytest.mark.parametrize("offload", ["disk", "accelerator"])
@pytest.mark.parametrize("family", ["opt", "bloom", "gemma3"])
def test_offload_changes_nothing(family: str, offload: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = pruned(family, basic(0.2, attention="value_dims", offload=offload))
    assert_same(elsewhere, pruned(family))
    assert list(tmp_path.iterdir()) == []


def test_disk_is_freed_after_an_exception(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("llama")
    seen = []

    def boom(module: nn.Module, args: Any) -> None:
        seen.extend(tmp_path.rglob("*.pt"))
        if seen:
            raise ArithmeticError

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(boom)
    with pytest.raises(ArithmeticError):
        FASPPruner(basic(0.2, offload="disk")).prune(model, calibration())
    assert seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gemma2"])
def test_micro_batches_change_nothing(family: str) -> None:
    config = basic(0.2, attention="value_dims", micro_batch_size=1)
    assert_same(pruned(family, config), pruned(family), tolerance=1e-4)


def test_device_asked_for_is_where_the_model_is() -> None:
    assert_same(pruned(config=basic(0.2, attention="value_dims", device="cpu")), pruned())


@pytest.mark.cuda
@pytest.mark.parametrize("offload", ["cpu", "accelerator", "disk"])
def test_model_on_the_cpu_is_pruned_on_the_accelerator_block_by_block(offload: str) -> None:
    model = pruned("llama-gqa", basic(0.2, attention="value_dims", device="cuda", offload=offload))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert_same(model, pruned("llama-gqa"), 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("family", TINY)
def test_pruning_on_the_accelerator_equals_that_on_the_cpu(family: str) -> None:
    model = tiny_model(family).to("cuda")
    FASPPruner(BOTH).prune(model, calibration())
    assert_same(model.cpu(), pruned(family), 1e-3)


@pytest.mark.cuda
def test_block_returns_from_the_accelerator_after_an_exception() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations must be finite"):
        FASPPruner(basic(0.2, device="cuda")).prune(model, calibration())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2", "bloom"])
def test_half_precision_model_is_pruned(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    report = FASPPruner(BOTH).prune(model, calibration())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = FASPPruner(BOTH).prune(tiny_model(family), calibration())
    for found, wanted in zip(report.pairs, exact.pairs, strict=True):
        assert found.error_after == pytest.approx(wanted.error_after, rel=0.1), found.layer
    with torch.no_grad():
        assert model(random_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_dropout_of_a_model_in_training_changes_nothing(family: str) -> None:
    model = tiny_model(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    FASPPruner(BOTH).prune(model, calibration())
    assert_same(model, pruned(family))
