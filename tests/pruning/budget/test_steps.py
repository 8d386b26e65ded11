"""Several prunings in turn are decided before the first, from shapes, as they will be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_pruning import assert_unchanged, basic, calibration, pruned

from fasp_lightning import FaspError, FASPPruner
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.steps import budgets_in_turn
from fasp_lightning.structure.plan import plan_of


def widths(budget: Budget) -> Any:
    return [[(pair.before, pair.after) for pair in block] for block in budget.pairs], budget.parameters_after


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention": "kv_groups"}),
        ("phi3", {"attention": "kv_groups", "multiple_of": 4}),
        ("opt", {"attention": "value_dims"}),
        ("llama-gqa", {"attention": "value_dims", "head_balance": "free"}),
        ("gpt2", {"attention": "none"}),
    ],
)
def test_budgets_are_those_of_the_prunings(family: str, options: dict[str, Any]) -> None:
    model, configs = tiny_model(family), [basic(sparsity, **options) for sparsity in (0.1, 0.25, 0.4)]
    found = list(budgets_in_turn(model, configs))
    assert_unchanged(model, family)
    assert plan_of(model) is None
    for config, budget in zip(configs, found, strict=True):
        report = FASPPruner(config).prune(model, calibration())
        after = [(pair.width_before, pair.width_after) for pair in report.pairs]
        assert after == [pair for block in widths(budget)[0] for pair in block if pair[0] > pair[1]]
        assert report.parameters_after == budget.parameters_after


def test_it_goes_on_from_a_pruned_model() -> None:
    model = pruned("opt", basic(0.1, attention="value_dims"))
    before, plan = {name: value.clone() for name, value in model.state_dict().items()}, plan_of(model)
    (budget,) = budgets_in_turn(model, [basic(0.3, attention="value_dims")])
    assert budget.sparsity_before == pytest.approx(0.1, abs=0.01)
    assert plan_of(model) == plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_that_is_out_of_reach_of_the_one_before_is_refused_in_its_turn() -> None:
    """From the original 0.45 can be reached: by fewer KV groups and a wider FFN than 0.2 has left."""
    configs = [basic(sparsity, attention="kv_groups") for sparsity in (0.2, 0.45)]
    assert len(list(budgets_in_turn(tiny_model("qwen3"), configs[1:]))) == 1
    budgets = budgets_in_turn(tiny_model("qwen3"), configs)
    assert next(budgets).sparsity == pytest.approx(0.2, abs=0.01)
    with pytest.raises(FaspError, match="whole KV groups and the FFN make up together, got 0"):
        next(budgets)


def test_rounds_are_checked_before_the_first_batch() -> None:
    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    model = tiny_model("qwen3")
    with pytest.raises(FaspError, match="whole KV groups and the FFN make up together"):
        FASPPruner(basic(0.45, attention="kv_groups", rounds=2)).prune(model, batches())
    assert_unchanged(model, "qwen3")
