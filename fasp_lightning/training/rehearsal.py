"""A schedule gone through on shapes alone: what each event will leave, and whether it can happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.steps import budgets_in_turn
from fasp_lightning.pruning.budget.widths import Pairs, budget_towards, decide_budget, present_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.training.schedule import PruningSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rehearse(model: PreTrainedModel, schedule: PruningSchedule, pruning: PruningConfig) -> list[Budget]:
    """The budget of every event, each from the widths that the one before leaves; no weight is read.

    Those whose widths are reached before, by an earlier event or in a model that was pruned already, change nothing;
    :func:`passed_over` names them.

    Args:
        model: A causal LM as it is before the first event, on any device, ``meta`` included; it stays so.
        schedule: The events.
        pruning: Settings; the sparsity is that of each event.

    Raises:
        FaspError: If an event cannot happen; the message names it.
    """
    budgets: list[Budget] = []
    configs = (replace(pruning, sparsity=event.sparsity) for event in schedule)
    turn = budgets_in_turn(model, configs, _decide)
    for index, event in enumerate(schedule):
        try:
            budgets.append(next(turn))
        except FaspError as error:
            raise FaspError(f"schedule entry {index}, {event.to_dict()!r}: {error}") from error
    return budgets


def cuts_of(model: PreTrainedModel, schedule: PruningSchedule, pruning: PruningConfig) -> Cuts:
    """What will be cut after all events; warns of those that will be passed over.

    Args:
        model: As for :func:`rehearse`, as the others.
        schedule: The events.
        pruning: Settings.

    Raises:
        FaspError: As :func:`rehearse`.
    """
    cuts, budgets = present_budget(model).cuts, rehearse(model, schedule, pruning)
    if idle := passed_over(schedule, budgets):
        rank_zero_warn(idle)
    for budget in budgets:
        cuts |= budget.cuts
    return cuts


def passed_over(schedule: PruningSchedule, budgets: Sequence[Budget]) -> str | None:
    """Say which events will change nothing, if any: rounded, their widths are those that are there before them.

    Args:
        schedule: The events.
        budgets: What :func:`rehearse` found for them.
    """
    idle = [f"{index} ({event.sparsity:g})" for index, event in enumerate(schedule) if not budgets[index].changes]
    if not idle:
        return None
    return (
        f"schedule entries that change no width are passed over: {', '.join(idle)}; whole units, or multiples of them, "
        "come to what is left before these: lower multiple_of, space them wider, or take them out"
    )


def _decide(model: PreTrainedModel, config: PruningConfig, pairs: Pairs) -> Budget:
    """An event may be passed over, but not where nothing was pruned before it."""
    budget = budget_towards(model, config, pairs)
    return budget if budget.changes or budget.sparsity_before else decide_budget(model, config, pairs)
