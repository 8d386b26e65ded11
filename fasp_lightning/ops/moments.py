"""Second moments of a consumer's inputs, handed out in blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.ops.symmetric import panels


class Moments(NamedTuple):
    """The gram G of some inputs, or that of the centred ones, G − T μ μᵀ, of which no more than blocks are made.

    Attributes:
        gram: (n, n) G, mirrored.
        mean: (n,) float64 column means μ; ``None`` leaves G as it is.
        tokens: Number T of tokens behind them, each counted by its weight.
    """

    gram: Tensor
    mean: Tensor | None = None
    tokens: float = 0.0

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(rows, columns) of it, in the dtype of the gram."""
        block = self.gram.index_select(0, rows).index_select(1, columns)
        if self.mean is None:
            return block
        means = self.mean[rows], self.mean[columns]
        return block.double().addr_(*means, alpha=-self.tokens).to(block.dtype)

    def diagonal(self) -> Tensor:
        """(n,) float64."""
        diagonal = self.gram.diagonal().double()
        return diagonal if self.mean is None else diagonal - self.tokens * self.mean.square()


def output_energies(weight: Tensor, moments: Moments, columns: Tensor) -> Tensor:
    """‖w_i X‖² of each output i, the diagonal of W G Wᵀ; half of its products, in the dtype of the weight.

    Args:
        weight: (out, m), float32 or float64.
        moments: Of X.
        columns: (m,) those that the weight is of.

    Returns:
        (out,) float64.
    """
    energies = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for panel in panels(len(columns)):
        block = moments.block(columns[panel], columns[: panel.stop]).to(weight.dtype)
        block[:, : panel.start] *= 2
        energies += (weight[:, : panel.stop] @ block.T).mul_(weight[:, panel]).sum(1, dtype=torch.float64)
    return energies.clamp_min_(0)


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """(out,) float64 Σ_j a_ij b_ij of two (out, m) matrices, without a third one of their size."""
    parts = [(first[:, panel].double() * second[:, panel]).sum(1) for panel in panels(first.shape[1])]
    return torch.stack(parts).sum(0)


def relative_error(residuals: Tensor, energies: Tensor) -> float:
    """‖WX − ŴX_M‖_F / ‖WX‖_F. A few massive outputs or tokens decide on it: see :func:`error_per_output`.

    Args:
        residuals: (out,) of :meth:`~fasp_lightning.ops.least_squares.LeastSquares.errors`.
        energies: (out,) of :meth:`~fasp_lightning.ops.least_squares.LeastSquares.energies`.
    """
    energy = energies.sum()
    return (residuals.sum() / energy).sqrt().item() if energy > 0 else 0.0


def error_per_output(residuals: Tensor, energies: Tensor) -> float:
    """Root mean square over the outputs i of ‖w_i X − ŵ_i X_M‖ / ‖w_i X‖, each at most 1: massive ones count as others.

    Args:
        residuals: (out,) of :meth:`~fasp_lightning.ops.least_squares.LeastSquares.errors`.
        energies: (out,) of :meth:`~fasp_lightning.ops.least_squares.LeastSquares.energies`; outputs without any
            are left out.
    """
    alive = energies > 0
    ratios = (residuals[alive] / energies[alive]).clamp_max(1)
    return ratios.mean().sqrt().item() if len(ratios) else 0.0
