"""Several prunings of one model, one after the other, decided from shapes before the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from fasp_lightning.pruning.budget.budget import Budget, PairWidth
from fasp_lightning.pruning.budget.widths import Pairs, decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decide(Protocol):
    """:func:`decide_budget`, or what decides like it."""

    def __call__(self, model: PreTrainedModel, config: PruningConfig, pairs: Pairs) -> Budget:
        """The budget of one pruning."""


def budgets_in_turn(
    model: PreTrainedModel, configs: Iterable[PruningConfig], decide: Decide = decide_budget
) -> Iterator[Budget]:
    """The budget of each of several prunings, each of what the ones before it leave.

    What can be reached from the original need not be from there: whole KV groups go in few steps, and an FFN that was
    cut far for one of them does not come back for the next. With adaptive allocation the uniform widths stand for those
    that loss sensitivity will decide.

    Args:
        model: A causal LM, which stays as it is.
        configs: The settings of each pruning, which differ in sparsity.
        decide: How each is decided.

    Yields:
        The budgets, in that order.

    Raises:
        FaspError: If a pruning is refused; those before it have been yielded.
    """
    pairs: Pairs | None = None
    for config in configs:
        pairs = pairs or resolve_pruned(model, whole=config.whole)
        budget = decide(model, config, pairs)
        yield budget
        pairs = [list(map(_left, *both)) for both in zip(pairs, budget.pairs, strict=True)]


def _left(pair: ResolvedPair, width: PairWidth) -> ResolvedPair:
    """The pair with so many units; which ones does not matter, but that heads are even."""
    groups = pair.layout.groups
    heads = groups if pair.kept.numel() % groups == width.after % groups == 0 else 1
    return replace(pair, kept=pair.kept.reshape(heads, -1)[:, : width.after // heads].reshape(-1))
