"""What the widths of a model amount to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_model
from tiny_pruning import BOTH, FFN

from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.layout import Cuts


def test_parameters_and_both_sparsities_follow_from_the_widths() -> None:
    model = tiny_model("llama")
    budget = decide_budget(model, BOTH)
    gone = sum(width.removed for block in budget.pairs for width in block)
    assert budget.parameters_before - budget.parameters_after == gone
    assert budget.sparsity == pytest.approx(gone / budget.linear_parameters)
    assert budget.sparsity_total == pytest.approx(gone / sum(one.numel() for one in model.parameters()))
    assert budget.sparsity_before == 0
    assert budget.changes


def test_only_pairs_that_lose_something_are_cut() -> None:
    budget = decide_budget(tiny_model("llama"), FFN)
    assert {width.kind for width in budget.cut} == {"ffn"}
    assert budget.cuts == Cuts(frozenset({"ffn"}))


def test_blocks_of_different_ffn_widths_are_uneven() -> None:
    budget = decide_budget(tiny_model("llama"), FFN)
    first, second = budget.pairs
    uneven = replace(budget, pairs=(first, (*second[:-1], replace(second[-1], after=second[-1].after - 1))))
    assert uneven.cuts.uneven
    assert not budget.cuts.uneven


@pytest.mark.parametrize(("kind", "later"), [("ffn", True), ("value", True), ("groups", False)])
def test_adaptive_widths_are_decided_later_except_kv_groups(kind: str, later: bool) -> None:
    budget = decide_budget(tiny_model("llama"), replace(BOTH, allocation="adaptive"))
    assert budget.decided_later(kind) == later
    assert not decide_budget(tiny_model("llama"), BOTH).decided_later(kind)
