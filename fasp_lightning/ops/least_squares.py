"""Closed-form restoration of a consumer after some of its columns were removed (FASP, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.selection import complement

LADDER = (1.0, 1e1, 1e2, 1e3)
"""Factors by which the damping grows while the Cholesky factorisation fails."""

LADDER_FLOOR = 1e-8
"""Damping from which the ladder climbs when none was asked for: the rounding of a float32 gram."""


class Restoration(NamedTuple):
    """Outcome of :func:`restore_weight`.

    Attributes:
        weight: (out, m) restored weight Ŵ in float64.
        damping: The damping that was used; larger than the one asked for if the ladder was climbed.
        solver: ``"none"`` (nothing to restore), ``"cholesky"`` or ``"eigh"``.
    """

    weight: Tensor
    damping: float
    solver: str


def restore_weight(
    weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float, ridge: str = "original"
) -> Restoration:
    """Least-squares weight on the kept columns M: min ‖W X − Ŵ X_M‖² + λ‖Ŵ − A‖², G = X Xᵀ.

    * ``ridge="original"``, A = W[:, M]:  Ŵ = W[:, M] + W[:, P] G[P, M] (G[M, M] + λI)⁻¹, P the removed columns.
      Its calibration error never exceeds the unrestored one.
    * ``ridge="zero"``, A = 0:  Ŵ = W G[:, M] (G[M, M] + λI)⁻¹. With strong damping it shrinks the weights.

    λ = damping · mean(diag G). Do not use it with far fewer tokens than kept columns and a small damping: the
    system is then singular, and the solution fits the calibration text only.

    Args:
        weight: (out, n) consumer weight, any floating dtype.
        gram: (n, n) gram of its inputs, float32 or float64. Centre it to refit a bias (:func:`refit_bias`).
        kept: (m,) ascending indices of the kept columns.
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
    weight = weight.double()
    removed = complement(kept, weight.shape[1])
    if removed.numel() == 0:
        return Restoration(weight[:, kept], damping, "none")
    base = weight[:, kept]
    # moments of what the kept columns have to take over: (out, m), float64 as the solve
    if ridge == "original":
        target = weight[:, removed] @ gram[removed[:, None], kept].double()
    else:
        target = weight @ gram[:, kept].double()
    scale = gram.diagonal().double().mean().item()
    solved, used, solver = _solve(gram[kept[:, None], kept].double(), target, damping, scale)
    return Restoration(base + solved if ridge == "original" else solved, used, solver)


def _solve(block: Tensor, target: Tensor, damping: float, scale: float) -> tuple[Tensor, float, str]:
    """target · (block + damping · scale · I)⁻¹ by Cholesky, a damping ladder, and at last an eigendecomposition."""
    # A dead column (always zero input) has a zero row: a unit pivot keeps the system regular, its target is 0.
    diagonal = block.diagonal()
    diagonal[diagonal <= 0] = scale if scale > 0 else 1.0
    done = 0.0
    for factor in LADDER:
        used = damping if factor == 1.0 else max(damping, LADDER_FLOOR) * factor
        diagonal += (used - done) * scale
        done = used
        lower, info = torch.linalg.cholesky_ex(block)
        if info.item() == 0 and _is_regular(lower):
            return torch.cholesky_solve(target.T, lower).T, used, "cholesky"
    values, vectors = torch.linalg.eigh(block)
    # Directions without energy carry nothing that could be restored. A gram has no negative eigenvalue but for
    # rounding, so that the lowest one measures how much of the rest is noise.
    floor = torch.maximum(values.abs().max() * values.numel() * torch.finfo(values.dtype).eps, -values.min())
    inverse = torch.where(values > floor, 1 / values.clamp_min(floor), torch.zeros_like(values))
    return ((target @ vectors) * inverse) @ vectors.T, used, "eigh"


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


def output_energies(weight: Tensor, gram: Tensor) -> Tensor:
    """‖w_i X‖² of each output i, the diagonal of W G Wᵀ; computed in the dtype of the gram.

    Args:
        weight: (out, n).
        gram: (n, n) gram of X.

    Returns:
        (out,) float64.
    """
    weight = weight.to(gram.dtype)
    return ((weight @ gram) * weight).sum(1, dtype=torch.float64).clamp_min(0)


def residual_energies(weight: Tensor, restored: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """‖w_i X − ŵ_i X_M‖² of each output i, with :func:`output_energies` of the difference of both weights.

    Args:
        weight: (out, n) original weight.
        restored: (out, m) weight on the kept columns.
        gram: (n, n) gram of X; the centred one if the bias is refitted.
        kept: (m,) kept columns.

    Returns:
        (out,) float64.
    """
    difference = weight.to(gram.dtype).clone()
    difference[:, kept] -= restored.to(gram.dtype)
    return output_energies(difference, gram)


def relative_error(residuals: Tensor, energies: Tensor) -> float:
    """‖WX − ŴX_M‖_F / ‖WX‖_F. A few massive outputs or tokens decide on it: see :func:`error_per_output`.

    Args:
        residuals: (out,) of :func:`residual_energies`.
        energies: (out,) of :func:`output_energies`.
    """
    energy = energies.sum()
    return (residuals.sum() / energy).sqrt().item() if energy > 0 else 0.0


def error_per_output(residuals: Tensor, energies: Tensor) -> float:
    """Root mean square over the outputs i of ‖w_i X − ŵ_i X_M‖ / ‖w_i X‖, each at most 1: massive ones count as others.

    Args:
        residuals: (out,) of :func:`residual_energies`.
        energies: (out,) of :func:`output_energies`; outputs without any are left out.
    """
    alive = energies > 0
    ratios = (residuals[alive] / energies[alive]).clamp_max(1)
    return ratios.mean().sqrt().item() if len(ratios) else 0.0
