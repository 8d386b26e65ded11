"""Which units of a pair stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import mask_units
from tiny import HEADS, random_tokens, tiny_model
from tiny_pruning import basic, calibration
from tiny_sensitivity import naive, scores
from torch import Tensor

from fasp_lightning import FASPPruner, PruningConfig, load_pruned, save_pruned
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.select import activation_scores, select_units
from fasp_lightning.structure.plan import resolve_pruned

FISHER = basic(0.3, attention="value_dims", score="fisher", restoration="none")
FREE = replace(FISHER, head_balance="free")


def pruned(name: str, config: PruningConfig) -> Any:
    model: Any = tiny_model(name)
    FASPPruner(config).prune(model, calibration())
    return model


def selected(place: int, sensitivity: Tensor, config: PruningConfig) -> list[int]:
    """Of one pair of a tiny llama, whose statistics say nothing."""
    model = tiny_model("llama")
    pair, width = resolve_pruned(model)[0][place], decide_budget(model, config).pairs[0][place]
    by_activations = activation_scores(pair, GramStatistics(pair.columns, "cpu"), config)
    scores = sensitivity if config.scores_by_sensitivity else by_activations
    return select_units(pair, width, scores, config).tolist()


@pytest.mark.parametrize("name", ["opt", "llama", "llama-gqa", "phi3"])
def test_units_that_the_loss_depends_on_most_stay(name: str) -> None:
    """In every block, by the loss sensitivity of the model as it was."""
    expected = naive(tiny_model(name), calibration())
    model = pruned(name, replace(FISHER, attention="none"))
    for block, wanted in zip(model.fasp_plan.blocks, expected, strict=True):
        ((_, pair),) = block.items()
        gone = sorted(set(range(pair.layout.width)) - set(pair.kept))
        assert wanted[-1][list(pair.kept)].min() > wanted[-1][gone].max()


def test_score_by_sensitivity_is_not_that_by_activations() -> None:
    plans = [pruned("llama", replace(FISHER, score=score)).fasp_plan for score in ("fisher", "wanda", "magnitude")]
    assert len({plan.to_json() for plan in plans}) == 3


@pytest.mark.parametrize(("allocation", "score"), [("adaptive", "fisher"), ("uniform", "wanda")])
def test_score_is_by_sensitivity_where_allocation_is(allocation: str, score: str) -> None:
    sensitivity = torch.linspace(0, 1, 48, dtype=torch.float64)  # the last ones count, by activations the first ones
    found = [selected(1, sensitivity, basic(score=name, allocation=allocation)) for name in ("auto", score)]
    assert found[0] == found[1]
    assert (47 in found[0], 0 in found[0]) == (score == "fisher", score == "wanda")


def test_later_blocks_are_scored_in_the_model_as_it_was() -> None:
    """The sensitivity is measured once, before the first block is cut."""
    before = scores(tiny_model("llama"), calibration())
    model = pruned("llama", replace(FISHER, attention="none"))
    kept = model.fasp_plan.blocks[1]["mlp.down_proj"].kept
    assert sorted(before[1][-1].topk(len(kept)).indices.tolist()) == list(kept)


@pytest.mark.parametrize("head", range(HEADS))
def test_even_heads_keep_the_same_number_and_free_ones_what_counts(head: int) -> None:
    """Only one head's dims count: free balance keeps all of them."""
    sensitivity = torch.linspace(0, 1, HEADS * 8, dtype=torch.float64)
    sensitivity[head * 8 : head * 8 + 8] += 10
    even, free = selected(0, sensitivity, FISHER), selected(0, sensitivity, FREE)
    of_heads = [sum(unit // 8 == one for unit in even) for one in range(HEADS)]
    assert of_heads == [len(even) // HEADS] * HEADS
    assert set(range(head * 8, head * 8 + 8)) <= set(free)
    best = sensitivity.topk(len(free)).indices.sort().values
    assert free == best.tolist()


@pytest.mark.parametrize("balance", ["even", "free"])
def test_ffn_units_know_no_heads(balance: Any) -> None:
    sensitivity = torch.linspace(0, 1, 48, dtype=torch.float64)
    kept = selected(1, sensitivity, replace(FISHER, head_balance=balance))
    assert kept == list(range(48 - len(kept), 48))


@pytest.mark.parametrize("name", ["opt", "llama", "llama-gqa", "gemma3", "phi3", "gpt2", "bloom"])
def test_model_whose_heads_lose_what_they_lose_equals_the_masked_one(name: str, tmp_path: Any) -> None:
    """One head loses all: its columns are without weight."""
    model = tiny_model(name)
    for block in resolve_pruned(model):
        pair = block[0]
        columns = pair.layout.columns(torch.arange(pair.layout.size))
        with torch.no_grad():
            (pair.consumer.weight.T if pair.transposed else pair.consumer.weight)[:, columns] = 0
    original = tiny_model(name)
    original.load_state_dict(model.state_dict())
    FASPPruner(replace(FREE, sparsity=0.4)).prune(model, calibration())
    for block, left in zip(model.fasp_plan.blocks, resolve_pruned(model), strict=True):
        dims = torch.bincount(left[0].kept // left[0].layout.size, minlength=left[0].layout.groups).tolist()
        assert dims[0] == 0 or left[0].layout.groups == 1
        assert block
    masked = mask_units(original, model.fasp_plan)
    save_pruned(model, tmp_path / "p")
    loaded = load_pruned(tmp_path / "p", attn_implementation=model.config._attn_implementation)
    with torch.no_grad():
        expected = masked(random_tokens()).logits
        torch.testing.assert_close(model(random_tokens()).logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(loaded(random_tokens()).logits, model(random_tokens()).logits)
