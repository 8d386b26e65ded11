"""The public call: what it refuses, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from tiny_pruning import BOTH, assert_same, assert_unchanged, calibration
from transformers import BatchEncoding

from fasp_lightning import FASPPruner, PruningConfig, perplexity


@pytest.mark.parametrize(
    ("batches", "error"),
    [([], "at least one calibration batch"), ([torch.tensor([[1, 97]])], r"input_ids must be in \[0, 97\).* got 97")],
    ids=["none", "outside-the-vocabulary"],
)
def test_bad_batches_leave_the_model_alone(batches: list[Any], error: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=error):
        FASPPruner(BOTH).prune(model, batches)
    assert_unchanged(model)


def test_a_tokenizers_batch_alone_is_the_calibration() -> None:
    one, listed = tiny_model("llama"), tiny_model("llama")
    (batch,) = calibration(1)
    given = BatchEncoding({"input_ids": batch["input_ids"] if isinstance(batch, dict) else batch})
    FASPPruner(BOTH).prune(one, given)
    FASPPruner(BOTH).prune(listed, [given])
    assert_same(one, listed)
    assert perplexity(one, given) == perplexity(one, [given])


def test_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(TINY["llama"].config())
    with pytest.raises(ValueError, match=r"weights in memory, got .* on the meta device"):
        FASPPruner().prune(model, calibration())


@pytest.mark.parametrize("name", ["model.norm.weight", "model.rotary_emb.inv_freq"])
def test_tensor_that_could_never_be_trained_is_refused(name: str) -> None:
    model = tiny_model("llama")
    owner, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    with torch.inference_mode():
        copied = getattr(owner, attribute).clone()
        setattr(owner, attribute, torch.nn.Parameter(copied) if attribute == "weight" else copied)
    with pytest.raises(ValueError, match=rf"got {name} made in torch\.inference_mode\(\); load it outside"):
        FASPPruner(BOTH).prune(model, calibration())


def test_refusals_come_before_the_first_batch() -> None:
    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    for config, error in (
        (PruningConfig(0.99), "sparsity must be at most"),
        (PruningConfig(multiple_of=99), "multiple_of"),
    ):
        with pytest.raises(ValueError, match=error):
            FASPPruner(config).prune(tiny_model("llama"), batches())
