"""From statistics to the restored weights of one pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.ops.basis import Basis
from fasp_lightning.ops.least_squares import (
    LeastSquares,
    Restoration,
    refit_bias,
    restore_weight,
)
from fasp_lightning.ops.moments import error_per_output, relative_error
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.budget.budget import PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.structure.pair import ResolvedPair

FALLBACK = 0.1
"""Damping where too little was held back to choose one."""

GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Dampings that ``damping="auto"`` chooses from, as multiples of the mean diagonal of the gram."""


class Fit(NamedTuple):
    """How well a restoration fits, by output of the consumer; those of several experts add up.

    Attributes:
        energies: (out,) ‖w_i X‖² of the consumer as it was.
        plain: (out,) squared error without restoration.
        errors: (out,) squared error with it.
        damping: As used.
        solver: As used.
    """

    energies: Tensor
    plain: Tensor
    errors: Tensor
    damping: float
    solver: str


class Restored(NamedTuple):
    """What :meth:`~fasp_lightning.structure.pair.ResolvedPair.assign` takes, and how it was found.

    Attributes:
        factors: (out, columns kept) weight, and the (r, columns kept) A of each adapter.
        bias: The (out,) bias if it is refitted.
        singular: The gram was singular with the damping asked for.
        fit: How well it fits.
    """

    factors: list[Tensor]
    bias: Tensor | None
    singular: bool
    fit: Fit

    def like(self, other: Tensor) -> Restored:
        """In the dtype of another tensor."""
        bias = None if self.bias is None else self.bias.to(other.dtype)
        return Restored([factor.to(other.dtype) for factor in self.factors], bias, self.singular, self.fit)


def restore_pair(
    pair: ResolvedPair,
    width: PairWidth,
    kept: Tensor,
    statistics: GramStatistics,
    held: GramStatistics | None,
    config: PruningConfig,
    bases: Sequence[Basis] = (),
    measured: GramStatistics | None = None,
) -> tuple[Restored, PairReport]:
    """Restore a consumer on the columns ``kept``, and measure the error before and after.

    A restoration that raises the calibration error (a ridge towards zero with strong damping can) is not taken, nor
    one that raises the error on the tokens held back. Their gram serves the final solve, too.

    Args:
        pair: The pair, not cut yet.
        width: Its widths.
        kept: Ascending positions among the consumer's columns so far.
        statistics: Of the consumer's inputs; afterwards of those held back, too.
        held: Of the inputs that were held back to choose the damping by.
        config: ``restoration``, ``ridge``, ``damping`` and ``refit_bias`` are read.
        bases: The basis of each KV head's value dims that the statistics are of, and the restored weights are for; by
            default the given one.
        measured: Of the inputs that the errors are of; by default those that it is fitted to.
    """
    problem = _Problem.of(pair, kept, config, bases)
    damping = None if config.restoration == "none" else config.damping
    on_held = None if held is None else problem.outputs(held)
    if damping == "auto":
        damping = _best_damping(problem, statistics, held, on_held)
    if held is not None:
        statistics.add(held)  # once the damping is chosen, every token serves
    outputs = problem.outputs(statistics)
    best = _Solution([factor[:, kept].double() for factor in problem.factors], None, 0.0, "none")
    errors = plain = outputs.plain()
    if damping is not None:
        restored = restore_weight(problem.rows(outputs), damping=damping, ridge=config.ridge)
        found = problem.solution(restored, statistics)
        found_errors = problem.errors(found, outputs)
        # A ridge towards zero shrinks the weights: with strong damping that does more harm than the columns that went.
        if found_errors.sum() <= plain.sum() and not (on_held and problem.gain(found, on_held) < 0):
            best, errors = found, found_errors
    singular = best.solver == "eigh" or best.damping > (damping or 0.0)
    if measured is not None:
        outputs = problem.outputs(measured)
        plain, errors = outputs.plain(), problem.errors(best, outputs)
    fit = Fit(outputs.energies(), plain, errors, best.damping, best.solver)
    entry = entry_of(width, [fit], "principal" if bases else "given")
    return Restored(best.factors, problem.refitted(best), singular, fit), entry


def entry_of(width: PairWidth, fits: Sequence[Fit], basis: str = "given") -> PairReport:
    """The report of one pair, from what became of it, or of each of its experts."""
    energies, plain, errors = (torch.stack(parts).sum(0) for parts in zip(*(fit[:3] for fit in fits), strict=True))
    return PairReport(
        layer=width.layer,
        kind=width.kind,
        width_before=width.before,
        width_after=width.after,
        basis=basis,
        error_before=relative_error(plain, energies),
        error_after=relative_error(errors, energies),
        output_error_before=error_per_output(plain, energies),
        output_error_after=error_per_output(errors, energies),
        damping=max(fit.damping for fit in fits),
        solver=max((fit.solver for fit in fits), key=("none", "cholesky", "eigh").index),
        seconds=0.0,
    )


def _best_damping(
    problem: _Problem, fitted: GramStatistics, held: GramStatistics | None, on_held: LeastSquares | None
) -> float | None:
    """The damping that is best on the tokens held back; ``None`` if none gains anything there."""
    if held is None or on_held is None or not held.tokens or not fitted.tokens:
        return FALLBACK
    rows = problem.rows(problem.outputs(fitted))
    gains = {}
    for damping in GRID:
        found = restore_weight(rows, damping=damping, ridge=problem.ridge)
        gains[damping] = problem.gain(problem.solution(found, fitted), on_held)
    best = max(gains, key=gains.__getitem__)
    return best if gains[best] > 0 else None


class _Solution(NamedTuple):
    """A weight on the kept columns.

    Attributes:
        factors: The rows of W, and of each adapter's A.
        mean: (n,) the inputs' means that the bias takes account of; ``None`` if it is not refitted.
        damping: As used.
        solver: As used.
    """

    factors: list[Tensor]
    mean: Tensor | None
    damping: float
    solver: str


@dataclass(frozen=True)
class _Problem:
    """Least squares of one consumer.

    Attributes:
        pair: The pair.
        kept: Columns that stay.
        factors: What is restored; in float64 where it is turned to another basis.
        weight: (out, n) what they make together.
        bias: The bias to be refitted.
        ridge: What the solution is pulled towards.
    """

    pair: ResolvedPair
    kept: Tensor
    factors: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    ridge: str

    @classmethod
    def of(cls, pair: ResolvedPair, kept: Tensor, config: PruningConfig, bases: Sequence[Basis]) -> _Problem:
        factors = pair.factors_in(bases) if bases else pair.factors
        weight = factors[0] if len(factors) == 1 else pair.effective([factor.double() for factor in factors])
        bias = getattr(pair.consumer, "bias", None) if config.refit_bias else None
        return cls(pair, kept, factors, weight, None if bias is None else bias.detach(), config.ridge)

    def outputs(self, statistics: GramStatistics) -> LeastSquares:
        """That of the consumer's outputs. With a bias to refit, the inputs are centred: it then carries their mean."""
        return LeastSquares(self.weight, statistics.moments(centred=self.bias is not None), self.kept)

    def rows(self, outputs: LeastSquares) -> LeastSquares:
        """That of what is restored.

        The restoration is a linear map of the columns, the same for every row: to restore W and each A is to restore
        W + Σ scaling · B A, and the rank stays.
        """
        return outputs if len(self.factors) == 1 else replace(outputs, weight=torch.cat(self.factors))

    def solution(self, found: Restoration, statistics: GramStatistics) -> _Solution:
        """The restored rows, taken apart again."""
        rows = list(found.weight.split([factor.shape[0] for factor in self.factors]))
        return _Solution(rows, None if self.bias is None else statistics.mean(), found.damping, found.solver)

    def errors(self, solution: _Solution, outputs: LeastSquares) -> Tensor:
        """(out,) ‖w_i X − ŵ_i X_M‖² over the tokens of the outputs, with the refitted bias if there is one."""
        return outputs.errors(self.pair.effective(solution.factors), solution.mean)

    def gain(self, solution: _Solution, outputs: LeastSquares) -> float:
        """By how much the error on some tokens is below that of no restoration."""
        return (outputs.plain() - self.errors(solution, outputs)).sum().item()

    def refitted(self, solution: _Solution) -> Tensor | None:
        """The bias that goes with a solution."""
        if self.bias is None or solution.mean is None:
            return None
        restored = self.pair.effective(solution.factors)
        return refit_bias(self.bias, self.weight, restored, solution.mean, self.kept)
