"""Closed-form restoration of a consumer after some of its columns were removed (FASP, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.moments import Moments, output_energies, row_products
from fasp_lightning.ops.selection import complement
from fasp_lightning.ops.symmetric import factorise, panels, solve

LADDER = (1.0, 1e1, 1e2, 1e3)
"""Factors by which the damping grows while the Cholesky factorisation fails."""

LADDER_FLOOR = 1e-8
"""Damping from which the ladder climbs when none was asked for: the rounding of a float32 gram."""

SINGLE_FROM = 1024
"""Kept columns from which float32 is tried: below it float64 costs nothing."""

PROBES = 16
"""Random sums of rows by which the error of a float32 solution is measured."""

REFINEMENTS = 2
"""How often a float32 solution is corrected by its float64 residual before the system is factorised in float64."""

CLEAR = 1e-5
"""Share of a column that a float32 factor of some thousands of them tells from rounding: 1e-7, times their root."""


class Restoration(NamedTuple):
    """Outcome of a restoration.

    Attributes:
        weight: (out, m) restored weight Ŵ in float64.
        damping: The damping that was used; larger than the one asked for if the ladder was climbed.
        solver: ``"none"`` (nothing to restore), ``"cholesky"`` or ``"eigh"``.
    """

    weight: Tensor
    damping: float
    solver: str


@dataclass(frozen=True)
class LeastSquares:
    """What a consumer's outputs lose with some of its columns, and the weight on the others with which they lose least.

    A weight on the kept columns M is counted from the original one, Ŵ = W_M + Δ. With P the removed columns its error
    is, output by output, w_P G_PP w_Pᵀ − 2 (w_P G_PM) δᵀ + δ G_MM δᵀ, where the first two factors are computed once.

    Args:
        weight: (out, n) W, any floating dtype.
        moments: Of the inputs X; those of the centred inputs to refit a bias (:func:`refit_bias`).
        kept: (m,) ascending indices M.
    """

    weight: Tensor
    moments: Moments
    kept: Tensor

    @cached_property
    def removed(self) -> Tensor:
        """(n − m,) ascending indices P."""
        return complement(self.kept, self.weight.shape[1])

    @cached_property
    def cross(self) -> Tensor:
        """(out, m) W_P G_PM in float64: what the kept columns have to take over."""
        weight = self.weight[:, self.removed].double()
        cross = weight.new_empty(len(weight), len(self.kept))
        for panel in panels(len(self.kept)):
            cross[:, panel] = weight @ self.moments.block(self.kept[panel], self.removed).double().T
        return cross

    @cached_property
    def _lost(self) -> Tensor:
        """(out,) w_P G_PP w_Pᵀ."""
        return self._energy(self.weight[:, self.removed], self.removed)

    def _energy(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Rounding adds to what an error is made of ~1e-7 of it in float32, far below what a report tells."""
        dtype = torch.float64 if len(self.kept) < SINGLE_FROM else torch.float32
        return output_energies(weight.to(dtype), self.moments, columns)

    def energies(self) -> Tensor:
        """‖w_i X‖² of each output i, (out,) float64; not centred."""
        base = self.weight[:, self.kept]
        around = self._lost + 2 * row_products(base, self.cross) + self._energy(base, self.kept)
        return (around + self._of_mean(None, None)).clamp_min(0)

    def plain(self) -> Tensor:
        """‖w_iP X_P‖² of each output i, (out,) float64: its error without restoration; not centred."""
        return self._lost + self._of_mean(self.weight[:, self.kept], None)

    def errors(self, restored: Tensor, about: Tensor | None = None) -> Tensor:
        """‖w_i X − ŵ_i X_M‖² of each output i, (out,) float64.

        Args:
            restored: (out, m) Ŵ.
            about: (n,) the inputs' means for which the bias is refitted; ``None`` leaves the bias as it was.
        """
        change = restored - self.weight[:, self.kept]
        around = self._lost - 2 * row_products(change, self.cross) + self._energy(change, self.kept)
        return (around + self._of_mean(restored, about)).clamp_min(0)

    def _of_mean(self, restored: Tensor | None, about: Tensor | None) -> Tensor | float:
        """(out,) T (w_i s − ŵ_i s_M)², s = μ − ν, which centred moments leave out."""
        if self.moments.mean is None:
            return 0.0
        shift = self.moments.mean if about is None else self.moments.mean - about
        outputs = self.weight.double() @ shift
        if restored is not None:
            outputs -= restored.double() @ shift[self.kept]
        return self.moments.tokens * outputs.square()


@dataclass(frozen=True)
class _System:
    """Δ A = B, where A = G_MM + S and S is diagonal; A is never made but as what is factorised.

    Attributes:
        moments: Those that G is of.
        kept: (m,) M.
        target: (out, m) B, float64.
        shift: (m,) diagonal of S, float64.
        unit: Mean of G's diagonal: float32 holds A / unit whatever X is measured in.
    """

    moments: Moments
    kept: Tensor
    target: Tensor
    shift: Tensor
    unit: float

    @classmethod
    def of(cls, problem: LeastSquares, damping: float, ridge: str) -> _System:
        """With the ridge towards the original Δ is pulled to 0, and towards zero to −W_M."""
        diagonal = problem.moments.diagonal()
        unit = diagonal.mean().item()
        unit = unit if unit > 0 else 1.0
        # A dead column (always zero input) has a zero row: a unit pivot keeps the system regular, its target is 0.
        shift = (diagonal[problem.kept] <= 0).double().add_(damping).mul_(unit)
        target = problem.cross
        if ridge == "zero":
            target = target - shift * problem.weight[:, problem.kept]
        return cls(problem.moments, problem.kept, target, shift, unit)

    def lower(self, dtype: torch.dtype) -> Tensor:
        """(m, m) A / unit in float32, or A in float64, below the diagonal."""
        unit = self.unit if dtype == torch.float32 else 1.0
        lower = torch.empty(len(self.kept), len(self.kept), dtype=dtype, device=self.kept.device)
        for panel in panels(len(self.kept)):
            block = self.moments.block(self.kept[panel], self.kept[: panel.stop]).double()
            block.diagonal(panel.start).add_(self.shift[panel])
            lower[panel, : panel.stop] = block.div_(unit)
        return lower

    def residual(self, target: Tensor, change: Tensor) -> Tensor:
        """Target − change · A, the products in float64, in float32 / unit."""
        residual = torch.empty(target.shape, dtype=torch.float32, device=target.device)
        change = change.double()
        for panel in panels(len(self.kept)):
            block = self.moments.block(self.kept[panel], self.kept).double()
            block.diagonal(panel.start).add_(self.shift[panel])
            residual[:, panel] = (target[:, panel] - change @ block.T) / self.unit
        return residual

    def is_told_by(self, lower: Tensor) -> bool:
        """Whether what the earlier columns leave of each one stands clear of the factor's rounding.

        Else the probes tell nothing, which are solved with the same factor. What is left is a share of the column: a
        massive one, beside which others look like rounding, does not send all to float64.
        """
        shares = lower.diagonal().double().square() * self.unit / (self.moments.diagonal()[self.kept] + self.shift)
        return bool(shares.min() > CLEAR)

    def in_single(self) -> Tensor | None:
        """Δ from a float32 factor, refined until float32 could not tell its error from the least; ``None`` if never.

        The backward error of a float32 factorisation is of the size of the rounding of a gram that was summed in
        float32: most often the first solution will do. Its error, the ridge included, exceeds the least by
        R A⁻¹ Rᵀ, R the residual, and the least is below that of Δ = 0 by Δ Bᵀ. Both are measured in float64 on a few
        random sums of rows; a residual of all rows costs as much as to solve for them in float64.
        """
        lower = self.lower(torch.float32)
        if not factorise(lower) or not self.is_told_by(lower):
            return None
        change = solve(lower, self.target.float().div_(self.unit))
        signs = _probes(self.target)
        wanted, before = signs @ self.target, float("inf")
        for step in range(REFINEMENTS + 1):
            probe = signs @ change.double()
            left = self.residual(wanted, probe)
            excess = (solve(lower, left.clone()) * left).sum().item() * self.unit
            if 0 <= excess <= torch.finfo(torch.float32).eps * (probe * wanted).sum().item():
                return change
            if step == REFINEMENTS or not excess < before / 4:
                return None
            change = change.double() + solve(lower, self.residual(self.target, change))
            before = excess
        return None


def restore_weight(problem: LeastSquares, *, damping: float, ridge: str = "original") -> Restoration:
    """Least-squares weight on the kept columns M: min ‖W X − Ŵ X_M‖² + λ‖Ŵ − A‖², G = X Xᵀ.

    * ``ridge="original"``, A = W[:, M]:  Ŵ = W[:, M] + W[:, P] G[P, M] (G[M, M] + λI)⁻¹, P the removed columns.
      Its calibration error never exceeds the unrestored one.
    * ``ridge="zero"``, A = 0:  Ŵ = W G[:, M] (G[M, M] + λI)⁻¹, found as W[:, M] and a change, too. With strong
      damping it shrinks the weights.

    λ = damping · mean(diag G). Do not use it with far fewer tokens than kept columns and a small damping: the
    system is then singular, and the solution fits the calibration text only.

    Args:
        problem: W, G and M; G centred to refit a bias (:func:`refit_bias`).
        damping: Ridge as a multiple of the mean diagonal of G, ≥ 0.
        ridge: ``"original"`` or ``"zero"``.

    Returns:
        The restored weight, the damping used, and the solver.

    Raises:
        FaspError: If ``damping`` is negative or ``ridge`` unknown.
    """
    if damping < 0:
        raise FaspError(f"damping must be >= 0, got {damping}")
    if ridge not in ("original", "zero"):
        raise FaspError(f"ridge must be 'original' or 'zero', got {ridge!r}")
    if problem.removed.numel() == 0:
        return Restoration(problem.weight[:, problem.kept].double(), damping, "none")
    change = None if len(problem.kept) < SINGLE_FROM else _System.of(problem, damping, ridge).in_single()
    found = _in_double(problem, damping, ridge) if change is None else (change, damping, "cholesky")
    return Restoration(problem.weight[:, problem.kept].double().add_(found[0]), *found[1:])


def _in_double(problem: LeastSquares, damping: float, ridge: str) -> tuple[Tensor, float, str]:
    """Δ by Cholesky, a damping ladder, and at last an eigendecomposition."""
    for factor in LADDER:
        used = damping if factor == 1.0 else max(damping, LADDER_FLOOR) * factor
        system = _System.of(problem, used, ridge)
        lower = system.lower(torch.float64)
        if factorise(lower) and _is_regular(lower):
            return solve(lower, system.target.clone()), used, "cholesky"
    values, vectors = torch.linalg.eigh(system.lower(torch.float64))
    # Directions without energy carry nothing that could be restored. A gram has no negative eigenvalue but for
    # rounding, so that the lowest one measures how much of the rest is noise.
    floor = torch.maximum(values.abs().max() * values.numel() * torch.finfo(values.dtype).eps, -values.min())
    inverse = torch.where(values > floor, 1 / values.clamp_min(floor), torch.zeros_like(values))
    return ((system.target @ vectors) * inverse) @ vectors.T, used, "eigh"


def _probes(target: Tensor) -> Tensor:
    """(PROBES, out) float64: random signs, the same ones every time, of rows that weigh alike."""
    signs = torch.randint(0, 2, (PROBES, len(target)), generator=torch.Generator().manual_seed(0)).to(target) * 2 - 1
    norms = target.norm(dim=1)
    return signs / norms.where(norms > 0, 1.0)


def _is_regular(lower: Tensor) -> bool:
    """Whether every squared pivot stands clear of rounding; a factor of noise solves nothing."""
    pivots = lower.diagonal().square()
    return bool(pivots.min() > pivots.max() * pivots.numel() * torch.finfo(pivots.dtype).eps)


def refit_bias(bias: Tensor, weight: Tensor, restored: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """Bias that makes the mean output right again, b̂ = b + W μ − Ŵ μ_M.

    It is the optimum only together with a weight restored on the centred gram.

    Args:
        bias: (out,) consumer bias.
        weight: (out, n) original weight.
        restored: (out, m) weight on the kept columns.
        mean: (n,) column means of the inputs.
        kept: (m,) kept columns.

    Returns:
        (out,) bias in float64.
    """
    mean = mean.double()
    return bias.double() + weight.double() @ mean - restored.double() @ mean[kept]
