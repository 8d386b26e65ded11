"""From statistics to the restored weights of one pair."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.ops.restoration import output_energy, refit_bias, residual_energy, restore_weight
from fasp_lightning.ops.selection import complement
from fasp_lightning.ops.statistics import GramStatistics, centre
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.pruning.widths import PairWidth
from fasp_lightning.structure.pair import ResolvedPair


class Restored(NamedTuple):
    """What :meth:`~fasp_lightning.structure.pair.ResolvedPair.assign` takes.

    Attributes:
        factors: (out, columns kept) weight, and the (r, columns kept) A of each adapter.
        bias: The (out,) bias if it is refitted.
    """

    factors: list[Tensor]
    bias: Tensor | None

    def like(self, other: Tensor) -> Restored:
        """In the dtype of another tensor."""
        bias = None if self.bias is None else self.bias.to(other.dtype)
        return Restored([factor.to(other.dtype) for factor in self.factors], bias)


def restore_pair(
    pair: ResolvedPair, width: PairWidth, kept: Tensor, statistics: GramStatistics, config: PruningConfig
) -> tuple[Restored, PairReport]:
    """Restore a consumer on the columns ``kept``, and measure the error before and after.

    A restoration that raises the calibration error (a ridge towards zero with strong damping can) is not taken.

    Args:
        pair: The pair, not cut yet.
        width: Its widths.
        kept: Ascending positions among the consumer's columns so far.
        statistics: Of the consumer's inputs.
        config: ``restoration``, ``ridge``, ``damping`` and ``refit_bias`` are read.
    """
    factors, gram = [factor.double() for factor in pair.factors], statistics.gram()
    weight = pair.effective(factors)
    energy = output_energy(weight, gram)
    removed = complement(kept, weight.shape[1])
    plain = output_energy(weight[:, removed], gram[removed[:, None], removed])  # what the removed columns gave
    best, bias, error, damping, solver = [factor[:, kept] for factor in factors], None, plain, 0.0, "none"
    if config.restoration == "least_squares":
        old = getattr(pair.consumer, "bias", None) if config.refit_bias else None
        mean = statistics.mean()
        used = gram if old is None else centre(gram, mean, statistics.tokens)
        # The restoration is a linear map of the columns, the same for every row: to restore W and each A is to
        # restore W + Σ scaling · B A, and the rank stays.
        found = restore_weight(torch.cat(factors), used, kept, damping=config.damping, ridge=config.ridge)
        rows = list(found.weight.split([factor.shape[0] for factor in factors]))
        restored = pair.effective(rows)
        restored_error = residual_energy(weight, restored, used, kept)
        if restored_error <= plain:
            best, error, damping, solver = rows, restored_error, found.damping, found.solver
            bias = None if old is None else refit_bias(old.detach(), weight, restored, mean, kept)
    entry = PairReport(
        layer=width.layer,
        kind=width.kind,
        width_before=width.before,
        width_after=width.after,
        error_before=_relative(plain, energy),
        error_after=_relative(error, energy),
        damping=damping,
        solver=solver,
        seconds=0.0,
    )
    return Restored(best, bias), entry


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy > 0 else 0.0
