"""How much each pair of each block loses, by one threshold on its loss sensitivity, or by its block's influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasp_lightning.pruning.budget.budget import SHARED, Budget, PairWidth
from fasp_lightning.pruning.budget.rounding import step_units
from fasp_lightning.pruning.budget.widths import PRUNED
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair

LEAST_OF_UNIFORM = 0.2
"""A pair has lost at least this times what it would have lost uniformly, since it was whole: scores of untouched blocks
are estimates too."""

MOST_OF_UNITS = 0.7
"""A pair loses at most this fraction of its units, or half of what a uniform cut would leave if that is more."""


@dataclass(frozen=True)
class _Steps:
    """What one pair can lose, in the order in which it goes.

    Attributes:
        units: (k,) units that go with each step.
        density: (k,) what puts it in order among the steps of all pairs, such as the loss sensitivity for each
            parameter that goes; ascending.
    """

    units: Tensor
    density: Tensor


def adaptive_budget(
    budget: Budget, pairs: list[list[ResolvedPair]], sensitivity: list[list[Tensor]], config: PruningConfig
) -> Budget:
    """Widths that remove the least sensitive parameters of all pairs of a budget, to the budget's total.

    All steps (a unit, or a multiple of FFN units, or one value dim of every head) of all pairs are put in the order of
    their sensitivity for each parameter; the first ones go, until as many parameters are gone as in the budget, to
    within half a step.

    Args:
        budget: The uniform widths.
        pairs: The pairs they belong to.
        sensitivity: (units left,) scores of each pair, from ``blocks.sensitivity.fisher_scores``.
        config: ``head_balance`` and ``multiple_of`` are read.

    Returns:
        The budget with other widths.
    """

    def steps(block: int, place: int, width: PairWidth) -> _Steps:
        return _steps(pairs[block][place], width, sensitivity[block][place], config)

    return _settled(budget, steps)


def influence_budget(
    budget: Budget, pairs: list[list[ResolvedPair]], influence: Tensor, config: PruningConfig
) -> Budget:
    """Widths that take more from blocks that do less, to the budget's total; no gradient is asked for.

    Block i loses r L softmax(−s/ε)ᵢ of its parameters where a uniform cut takes r of each of L blocks (MoDeGPT, Lin et
    al., arXiv:2408.09632, section 3.3): s is its influence and ε the temperature. What a block cannot give, as its
    pairs lose so much at most, the others give in the same proportions.

    Args:
        budget: The uniform widths.
        pairs: The pairs they belong to.
        influence: (blocks,) from ``blocks.influence.block_influence``.
        config: ``head_balance``, ``multiple_of`` and ``influence_temperature`` are read.

    Returns:
        The budget with other widths.
    """
    shares = (-influence / config.influence_temperature).softmax(0) * len(influence)

    def steps(block: int, place: int, width: PairWidth) -> _Steps:
        return _shared_steps(pairs[block][place], width, shares[block], config)

    return _settled(budget, steps)


def _settled(budget: Budget, steps_of: Callable[[int, int, PairWidth], _Steps]) -> Budget:
    """The budget with the widths at one threshold.

    Args:
        budget: The uniform widths.
        steps_of: Block, place of a pair in it and its width → its steps.
    """
    chosen = [
        (block, place)
        for block, widths in enumerate(budget.pairs)
        for place, width in enumerate(widths)
        if width.kind in PRUNED[budget.attention] - {SHARED}
    ]
    widths = [budget.pairs[block][place] for block, place in chosen]
    steps = [steps_of(block, place, width) for (block, place), width in zip(chosen, widths, strict=True)]
    found = [list(block) for block in budget.pairs]
    wanted = budget.parameters_before - budget.parameters_after
    wanted -= sum(width.removed for block in found for width in block if width not in widths)
    for (block, place), width, units in zip(chosen, widths, _take(steps, widths, wanted), strict=True):
        found[block][place] = replace(width, after=width.before - units)
    newly = sum(width.removed for block in found for width in block)
    return replace(
        budget, pairs=tuple(tuple(block) for block in found), parameters_after=budget.parameters_before - newly
    )


def _steps(pair: ResolvedPair, width: PairWidth, scores: Tensor, config: PruningConfig) -> _Steps:
    """The steps of one pair, by their sensitivity."""
    step, heads = _numbered(pair, width, config)
    ascending = scores.double().reshape(heads, -1).sort(dim=1).values.sum(0)
    total = ascending.new_zeros(int(step[-1]) + 1).index_add(0, step, ascending)
    going = torch.bincount(step) * heads
    return _Steps(going, total / (going * width.cost))


def _shared_steps(pair: ResolvedPair, width: PairWidth, share: Tensor, config: PruningConfig) -> _Steps:
    """The steps of one pair, by how much of its share is gone with them."""
    step, heads = _numbered(pair, width, config)
    going = torch.bincount(step) * heads
    reach = going.cumsum(0) + width.original - width.before
    return _Steps(going, (reach - going / 2) / (share * (width.original - width.after)).clamp(min=1e-12))


def _numbered(pair: ResolvedPair, width: PairWidth, config: PruningConfig) -> tuple[Tensor, int]:
    """The number of the step with which each unit goes, of each head where those are even, and of how many heads."""
    units = step_units(pair, config)
    heads, size = (1, units) if width.kind == "ffn" else (units, 1)
    each = pair.kept.numel() // heads
    return (torch.arange(each) + -width.before % size) // size, heads  # the first one ends at a multiple


def _take(steps: list[_Steps], widths: list[PairWidth], wanted: int) -> list[int]:
    """Units that go from each pair, at the threshold where ``wanted`` parameters are gone."""
    density, cost, owner, units = [], [], [], []
    for index, (step, width) in enumerate(zip(steps, widths, strict=True)):
        reach = step.units.cumsum(0) + width.original - width.before  # since the pair was whole
        most = max(MOST_OF_UNITS * width.original, (width.original + width.original - width.after) / 2)
        allowed = (reach <= most) & (reach < width.original)
        forced = reach <= LEAST_OF_UNIFORM * (width.original - width.after)
        density.append(torch.where(forced, -torch.inf, step.density)[allowed])
        units.append(step.units[allowed])
        cost.append(units[-1] * width.cost)
        owner.append(torch.full_like(units[-1], index))
    order = torch.cat(density).sort(stable=True).indices
    costs = torch.cat(cost)[order]
    taken = order[costs.cumsum(0) - costs / 2 <= wanted]
    gone = torch.zeros(len(steps), dtype=torch.long)
    return gone.index_add(0, torch.cat(owner)[taken], torch.cat(units)[taken]).tolist()
