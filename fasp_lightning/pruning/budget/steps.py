"""Several prunings of one model, one after the other, decided from shapes before the first of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.plan import record_plan, resolve_pruned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def budgets_in_turn(
    model: PreTrainedModel,
    configs: Iterable[PruningConfig],
    decide: Callable[[PreTrainedModel, PruningConfig], Budget] = decide_budget,
) -> Iterator[Budget]:
    """The budget of each of several prunings, each of what the ones before it leave.

    What can be reached from the original need not be from there: whole KV groups go in few steps, and an FFN that was
    cut far for one of them does not come back for the next. With adaptive allocation the uniform widths stand for those
    that loss sensitivity will decide.

    Args:
        model: A causal LM, which stays as it is.
        configs: The settings of each pruning.
        decide: How each is decided, on a model without weights.

    Yields:
        The budgets, in that order.

    Raises:
        FaspError: If a pruning is refused; those before it have been yielded.
    """
    with own_modes():
        shapes = _without_weights(model)
    for config in configs:
        budget = decide(shapes, config)
        yield budget
        if budget.changes:
            _reach(shapes, budget)


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the ``meta`` device; no weight is copied on the way."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for tensor in chain(model.buffers(), (one.grad for one in model.parameters() if one.grad is not None)):
        memo[id(tensor)] = tensor.to("meta")
    return copy.deepcopy(model, memo)


def _reach(model: PreTrainedModel, budget: Budget) -> None:
    """Give a model the widths; which units stay does not matter, but that heads are even."""
    pairs = resolve_pruned(model, kv_groups=budget.attention == "kv_groups")
    for block, planned in zip(pairs, budget.pairs, strict=True):
        for pair, width in zip(block, planned, strict=True):
            groups = pair.layout.groups
            heads = groups if pair.kept.numel() % groups == width.after % groups == 0 else 1
            pair.cut(pair.kept.reshape(heads, -1)[:, : width.after // heads].reshape(-1))
    record_plan(model, pairs)
