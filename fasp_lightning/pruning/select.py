"""From scores to the units of one pair that stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fasp_lightning.ops.basis import Basis
from fasp_lightning.ops.scores import wanda_score
from fasp_lightning.ops.selection import select_columns
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.budget.budget import PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair


def select_units(pair: ResolvedPair, width: PairWidth, scores: Tensor, config: PruningConfig) -> Tensor:
    """Units to keep: those with the highest scores, of each head the same number where heads are kept even.

    Args:
        pair: The pair, not cut yet.
        width: Its widths.
        scores: (units left,) scores.
        config: ``head_balance`` is read.

    Returns:
        (units kept,) ascending, in original numbering, on the CPU.
    """
    heads = even_heads(pair, config)
    return pair.kept[select_columns(scores, width.after // heads, heads)]


def even_heads(pair: ResolvedPair, config: PruningConfig) -> int:
    """In how many groups of units the same number is kept; 1 where they may differ."""
    return pair.layout.groups if config.head_balance == "even" else 1


def activation_scores(
    pair: ResolvedPair, statistics: GramStatistics, config: PruningConfig, bases: Sequence[Basis] = ()
) -> Tensor:
    """Scores of the units left, from the consumer's weights and inputs; a unit's is the sum over the columns it feeds.

    Args:
        pair: The pair, not cut yet.
        statistics: Of the consumer's inputs.
        config: ``score`` is read.
        bases: As for :func:`~fasp_lightning.pruning.restore.restore_pair`.

    Returns:
        (units left,) float64, on the CPU.
    """
    norms = statistics.norms()
    if config.score == "magnitude":
        norms = (norms > 0).double()  # a dead column goes first, whatever its weights
    weight = pair.effective(pair.factors_in(bases)) if bases else pair.weight
    return pair.layout.unit_scores(wanda_score(weight, norms), pair.kept)
