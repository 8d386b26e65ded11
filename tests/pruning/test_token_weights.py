"""A calibration batch of weight w counts as if it were given w times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tiny import random_tokens, tiny_model
from tiny_pruning import assert_same, assert_unchanged, basic, calibration, pruned

from fasp_lightning import FASPPruner, perplexity
from fasp_lightning.pruning.blocks.capture import micro_batches
from fasp_lightning.text.config import TextConfig, for_role


def weighted(batch: Any, weight: float) -> dict[str, Any]:
    """The batch, with a weight."""
    return {**(batch if isinstance(batch, Mapping) else {"input_ids": batch}), "weight": weight}


@pytest.mark.parametrize("index", [0, 1], ids=["padded", "plain"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa"])  # with and without a bias that is refitted
def test_weight_two_equals_the_batch_given_twice(family: str, index: int) -> None:
    batches = calibration()
    heavy = [weighted(batch, 2.0) if i == index else batch for i, batch in enumerate(batches)]
    twice = [*batches, batches[index]]
    assert_same(pruned(family, batches=heavy), pruned(family, batches=twice), tolerance=1e-4)


def test_one_weight_for_all_batches_changes_nothing() -> None:
    heavy = [weighted(batch, 3.5) for batch in calibration()]
    assert_same(pruned("opt", batches=heavy), pruned("opt"), tolerance=1e-4)


def test_a_weight_matters() -> None:
    padded, *others = calibration()
    heavy, plain = pruned(batches=[weighted(padded, 50), *others]), pruned()
    name = "model.layers.1.mlp.down_proj.weight"
    assert (heavy.state_dict()[name] - plain.state_dict()[name]).abs().max() > 1e-3


def test_each_piece_of_a_batch_has_its_weight() -> None:
    pieces = list(micro_batches([weighted(random_tokens(3), 2.5), random_tokens(2)], 1))
    assert [piece.weight for piece in pieces] == [2.5, 2.5, 2.5, 1.0, 1.0]


def test_a_bad_weight_leaves_the_model_as_it_is() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="weight of a batch must be positive and finite, got -1"):
        FASPPruner(basic(0.2)).prune(model, [*calibration(), weighted(random_tokens(), -1)])
    assert_unchanged(model)


def test_perplexity_refuses_a_weight() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    assert perplexity(model, [weighted(tokens, 1)]) == perplexity(model, [tokens])
    with pytest.raises(ValueError, match=r"must be 1 where perplexity is measured, got 0\.5: every token counts alike"):
        perplexity(model, [weighted(tokens, 0.5)])


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_is_a_positive_number(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"token_weight must be positive and finite, got {weight}"):
        TextConfig(token_weight=weight)


@pytest.mark.parametrize("role", ["train", "test", "validation"])
def test_only_calibration_text_has_a_weight(role: str) -> None:
    heavy = TextConfig(token_weight=2)
    assert for_role(heavy, "calibration").token_weight == 2
    with pytest.raises(ValueError, match="token_weight must be 1 for all but calibration text, got 2 for topics"):
        for_role(heavy, role)
