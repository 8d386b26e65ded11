"""Shares of the parameters that go: the sum is what was asked for."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from tiny_pruning import BOTH, calibration

from fasp_lightning import FaspError, FASPPruner
from fasp_lightning.pruning.budget.shares import level, removed, share_to_remove, size_of
from fasp_lightning.structure.plan import resolve_pruned


@pytest.mark.parametrize("gone", [[0, 0, 0], [50, 0, 0], [10, 20, 30], [100, 0, 5]])
@pytest.mark.parametrize("wanted", [60.0, 120.0, 200.0])
def test_parts_lose_what_is_wanted_together(gone: list[int], wanted: float) -> None:
    sizes = [100, 200, 50]
    share = level(wanted, sizes, gone)
    lost = sum(max(share * size, part) for size, part in zip(sizes, gone, strict=True))
    assert lost == pytest.approx(max(wanted, sum(gone))) or sum(gone) > wanted


def test_a_part_that_is_not_pruned_takes_no_share() -> None:
    assert level(30.0, [100, 0], [0, 0]) == 0.3
    assert level(30.0, [100, 0], [0, 10]) == 0.2


def test_removed_parameters_are_those_of_the_units_that_are_gone() -> None:
    model = tiny_model("llama")
    before = sum(parameter.numel() for parameter in model.parameters())
    FASPPruner(BOTH).prune(model, calibration())
    pairs = [pair for block in resolve_pruned(model) for pair in block]
    assert sum(map(removed, pairs)) == before - sum(parameter.numel() for parameter in model.parameters())
    assert all(removed(pair) < size_of(pair) for pair in pairs)


def test_highest_sparsity_is_named_and_can_be_reached() -> None:
    pairs = resolve_pruned(tiny_model("llama"))
    least: list[list[int | None]] = [[None, 1] for _ in pairs]
    total = sum(size_of(pair) for block in pairs for pair in block)
    with pytest.raises(
        FaspError, match=r"sparsity must be at most (0\.\d+) with the attention kept, got 0\.99"
    ) as caught:
        share_to_remove(pairs, least, 0.99, total, "the attention")
    highest = float(str(caught.value).split("at most ")[1].split()[0])
    assert 0 < share_to_remove(pairs, least, highest, total, "the attention") <= 1
