"""A schedule is gone through before the run: what fit and fasp schedule say of it is what happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runs import FFN_ONLY
from tiny import tiny_model
from tiny_pruning import BOTH, assert_unchanged, basic, calibration

from fasp_lightning import FASPPruner, PruningSchedule
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.training.rehearsal import passed_over, rehearse

SETTINGS = {"ffn": FFN_ONLY, "value dims": BOTH, "KV groups": basic(attention="kv_groups")}


def schedule(*sparsities: float) -> PruningSchedule:
    return PruningSchedule([{"step": step, "sparsity": sparsity} for step, sparsity in enumerate(sparsities)])


@pytest.mark.parametrize("settings", SETTINGS)
def test_budgets_are_those_of_the_model_when_its_events_come(settings: str) -> None:
    pruning, model = SETTINGS[settings], tiny_model("llama-gqa")
    budgets = rehearse(model, schedule(0.15, 0.3, 0.5), pruning)
    for sparsity, budget in zip((0.15, 0.3, 0.5), budgets, strict=True):
        config = replace(pruning, sparsity=sparsity)
        found = decide_budget(model, config)
        assert [[(pair.before, pair.after) for pair in block] for block in found.pairs] == [
            [(pair.before, pair.after) for pair in block] for block in budget.pairs
        ]
        assert replace(found, pairs=()) == replace(budget, pairs=())
        FASPPruner(config).prune(model, calibration())


def test_model_stays_as_it_is() -> None:
    model = tiny_model("llama")
    rehearse(model, schedule(0.2, 0.4), BOTH)
    assert_unchanged(model)
    assert getattr(model, "fasp_plan", None) is None


def test_events_that_the_model_has_reached_change_nothing() -> None:
    model = tiny_model("llama")
    FASPPruner(replace(BOTH, sparsity=0.2)).prune(model, calibration())
    budgets = rehearse(model, schedule(0.1, 0.2, 0.3), BOTH)
    assert [budget.changes for budget in budgets] == [False, False, True]


def test_events_that_change_nothing_are_named() -> None:
    events, pruning = schedule(0.2, 0.21, 0.35), replace(FFN_ONLY, multiple_of=16)
    budgets = rehearse(tiny_model("llama"), events, pruning)
    assert [budget.changes for budget in budgets] == [True, False, True]
    assert "passed over: 1 (0.21);" in str(passed_over(events, budgets))
    assert passed_over(schedule(0.2, 0.35), [budgets[0], budgets[2]]) is None


def test_first_event_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule entry 0, .*multiple_of must be small enough"):
        rehearse(tiny_model("llama"), schedule(0.02, 0.35), replace(FFN_ONLY, multiple_of=16))


def test_event_that_an_earlier_one_makes_impossible_is_refused() -> None:
    """Each of these sparsities can be reached from the original model."""
    events = schedule(0.237, 0.415, 0.597, 0.687)
    for event in events:
        decide_budget(tiny_model("llama-gqa"), basic(event.sparsity, attention="kv_groups"))
    with pytest.raises(ValueError, match=r"schedule entry 2, .*whole KV groups and the FFN"):
        rehearse(tiny_model("llama-gqa"), events, basic(attention="kv_groups"))
