"""From statistics, or loss sensitivity, to the units of one pair that stay."""

from __future__ import annotations

from torch import Tensor

from fasp_lightning.ops.scores import wanda_score
from fasp_lightning.ops.selection import select_columns
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.budget.widths import PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair


def select_units(
    pair: ResolvedPair, width: PairWidth, statistics: GramStatistics, sensitivity: Tensor | None, config: PruningConfig
) -> Tensor:
    """Units to keep: those with the highest scores, of each head the same number where heads are kept even.

    Args:
        pair: The pair, not cut yet.
        width: Its widths.
        statistics: Of the consumer's inputs.
        sensitivity: (units left,) loss sensitivity, where ``config`` scores by it.
        config: ``score``, ``allocation`` and ``head_balance`` are read.

    Returns:
        (units kept,) ascending, in original numbering, on the CPU.
    """
    scores = _scores(pair, statistics, sensitivity, config)
    heads = pair.layout.groups if config.head_balance == "even" else 1
    return pair.kept[select_columns(scores, width.after // heads, heads)]


def _scores(
    pair: ResolvedPair, statistics: GramStatistics, sensitivity: Tensor | None, config: PruningConfig
) -> Tensor:
    """(units left,) scores; a unit's is the sum over the columns it feeds."""
    if config.score == "fisher" or (config.score == "auto" and config.allocation == "adaptive"):
        assert sensitivity is not None
        return sensitivity
    norms = statistics.norms()
    if config.score == "magnitude":
        norms = (norms > 0).double()  # a dead column goes first, whatever its weights
    return pair.layout.unit_scores(wanda_score(pair.weight, norms), pair.kept)
