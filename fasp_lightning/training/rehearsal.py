"""A schedule gone through on shapes alone: what each event will leave, and whether it can happen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import Budget, PairWidth
from fasp_lightning.pruning.budget.widths import budget_towards, decide_budget, is_reached
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.training.schedule import PruningSchedule, ScheduledPruning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rehearse(model: PreTrainedModel, schedule: PruningSchedule, pruning: PruningConfig) -> list[Budget]:
    """The budget of every event, each from the widths that the one before leaves; no weight is read.

    Events that the model has reached already, as one that was pruned before, come first and change nothing.

    Args:
        model: A causal LM as it is before the first event, on any device, ``meta`` included; it stays so.
        schedule: The events.
        pruning: Settings; the sparsity is that of each event.

    Raises:
        FaspError: If an event cannot happen, or would change nothing; the message names it.
    """
    pairs = resolve_pruned(model, kv_groups=pruning.attention == "kv_groups")
    budgets: list[Budget] = []
    for index, event in enumerate(schedule):
        config = replace(pruning, sparsity=event.sparsity)
        try:
            budget = budget_towards(model, config, pairs)
            begun = any(earlier.changes for earlier in budgets)
            if begun and not budget.changes:
                raise FaspError(_unchanged(index - 1, list(schedule)[index - 1], config))
            if not begun and not is_reached(model, config):
                decide_budget(model, config, pairs)
        except FaspError as error:
            raise FaspError(f"schedule entry {index}, {event.to_dict()!r}: {error}") from error
        pairs = [list(map(_left, *both)) for both in zip(pairs, budget.pairs, strict=True)]
        budgets.append(budget)
    return budgets


def _unchanged(index: int, before: ScheduledPruning, config: PruningConfig) -> str:
    rounded = f"multiple_of={config.multiple_of}" if config.multiple_of > 1 else "whole units"
    return (
        f"sparsity must change a width, which rounded to {rounded} are those that entry {index}, {before.to_dict()!r}, "
        "leaves; raise it, take the entry out" + (", or lower multiple_of" if config.multiple_of > 1 else "")
    )


def _left(pair: ResolvedPair, width: PairWidth) -> ResolvedPair:
    """The pair with so many units; which ones does not matter, but that heads are even."""
    groups = pair.layout.groups
    heads = groups if pair.kept.numel() % groups == width.after % groups == 0 else 1
    return replace(pair, kept=pair.kept.reshape(heads, -1)[:, : width.after // heads].reshape(-1))
