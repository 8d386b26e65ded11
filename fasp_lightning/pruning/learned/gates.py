"""Gates of all units: closed where the budget leaves no room, and learned through a smooth stand-in of the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.pruning.budget.allocation import adaptive_budget
from fasp_lightning.pruning.budget.budget import Budget, PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.select import even_heads, select_units
from fasp_lightning.structure.modes import Hook, hooked
from fasp_lightning.structure.pair import ResolvedPair

SLOPE = 2.0
"""Of the smooth stand-in at its threshold, in standard deviations of a pair's starting scores."""

FLOOR = 0.1
"""Units without any sensitivity start at this times the least of the others, as a logarithm needs."""


class Gates:
    """One gate a unit, at every column of the consumer that the unit feeds.

    A unit's score is log s / σ + δ: s its loss sensitivity, σ the standard deviation of log s in its pair, δ what is
    learned. In terms of s, that is s · exp(σ δ), which allocation and selection read like any other score: so the
    gates that are open are the units that a pruning by these scores would keep.

    Args:
        pairs: The pairs of each block.
        budget: The uniform widths.
        sensitivity: (units left,) loss sensitivity of each pair of each block.
        config: ``allocation``, ``head_balance`` and ``multiple_of`` are read.

    Attributes:
        offsets: (units of all pairs,) float64, δ.
    """

    def __init__(
        self, pairs: list[list[ResolvedPair]], budget: Budget, sensitivity: list[list[Tensor]], config: PruningConfig
    ) -> None:
        self.pairs, self.config = pairs, config
        self._uniform = budget
        self._floored = [[_floored(scores) for scores in block] for block in sensitivity]
        self._spreads = [[_spread(scores) for scores in block] for block in self._floored]
        self._sizes = [scores.numel() for block in sensitivity for scores in block]
        self.offsets = torch.zeros(sum(self._sizes), dtype=torch.float64)

    def scores(self, offsets: Tensor | None = None) -> list[list[Tensor]]:
        """(units left,) of each pair of each block, in the units of loss sensitivity; by default of the present δ."""
        given = self.offsets if offsets is None else offsets
        parts = iter(given.detach().split(self._sizes))
        return [
            [floored * (spread * next(parts)).exp() for floored, spread in zip(*block, strict=True)]
            for block in zip(self._floored, self._spreads, strict=True)
        ]

    def budget(self, scores: list[list[Tensor]]) -> Budget:
        """The widths that a pruning by some scores has."""
        adaptive = self.config.allocation == "adaptive"
        return adaptive_budget(self._uniform, self.pairs, scores, self.config) if adaptive else self._uniform

    def attached(self) -> AbstractContextManager[None]:
        """Close the gates of all units that would go now; gradients with respect to ``offsets`` pass through."""
        scores = self.scores()
        widths = (width for block in self.budget(scores).pairs for width in block)
        pairs = (pair for block in self.pairs for pair in block)
        flat = (score for block in scores for score in block)
        hooks = [
            (pair.consumer, _closing(self._columns(pair, width, score, spread, offsets)))
            for pair, width, score, spread, offsets in zip(
                pairs, widths, flat, self._flat_spreads(), self.offsets.split(self._sizes), strict=True
            )
            if width.after < width.before
        ]
        return hooked(before=hooks)

    def _flat_spreads(self) -> Iterator[float]:
        return (spread for block in self._spreads for spread in block)

    def _columns(self, pair: ResolvedPair, width: PairWidth, scores: Tensor, spread: float, offsets: Tensor) -> Tensor:
        """(columns left,) one where a gate is open and zero where it is closed, with the gradient of the stand-in.

        That is σ(2 (score − threshold)), the threshold half-way between the scores of the last unit that stays and the
        first that goes, in each head where heads are kept even (straight-through; Bengio et al., arXiv:1308.3432).
        """
        open_ = torch.isin(pair.kept, select_units(pair, width, scores, self.config))
        heads = even_heads(pair, self.config)
        learned = (scores.log() / spread).reshape(heads, -1)
        last, first = (
            learned.masked_fill(~open_.reshape(heads, -1), torch.inf).amin(1, keepdim=True),
            learned.masked_fill(open_.reshape(heads, -1), -torch.inf).amax(1, keepdim=True),
        )
        smooth = torch.sigmoid(
            SLOPE * (learned - (last + first) / 2).reshape(-1) + SLOPE * (offsets - offsets.detach())
        )
        gates = open_.to(smooth) + (smooth - smooth.detach())  # in this order the forward value is exact
        return gates[torch.searchsorted(pair.kept, pair.layout.units_of(pair.layout.columns(pair.kept)))]


def _closing(gates: Tensor) -> Hook:
    """A hook before a consumer's forward that multiplies its input by its gates."""

    def close(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs, *others = args
        return (inputs * gates.to(inputs), *others), kwargs

    return close


def _floored(scores: Tensor) -> Tensor:
    """Scores of which none is 0; their order is as before."""
    positive = scores[scores > 0]
    return scores.clamp_min(FLOOR * float(positive.min())) if len(positive) else torch.ones_like(scores)


def _spread(scores: Tensor) -> float:
    """Standard deviation of the logarithm; 1 where all scores are the same."""
    return float(scores.log().std(correction=0)) or 1.0
