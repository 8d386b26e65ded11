"""Symmetric matrices as large as memory allows: in place, panel by panel, of the lower triangle alone.

What is above the diagonal is neither read nor meant; a row-major matrix is neither copied nor transposed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 512
"""Rows that are worked on at once: wide enough for matrix products, and little beside a matrix of thousands."""

CORNER = 256
"""Columns of a factorisation that are made at once: n · CORNER² operations are not those of a matrix product."""


def panels(size: int, width: int = PANEL) -> Iterator[slice]:
    """Slices that cover ``range(size)`` in order."""
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def mirror(matrix: Tensor) -> Tensor:
    """Put the transpose of the strictly lower triangle above the diagonal, in place."""
    for panel in panels(matrix.shape[0]):
        matrix[: panel.start, panel] = matrix[panel, : panel.start].T
        corner = matrix[panel, panel]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return matrix


def factorise(matrix: Tensor) -> bool:
    """Cholesky factor L of L Lᵀ, in place of the lower triangle.

    Args:
        matrix: (n, n) positive definite.

    Returns:
        Whether it was positive definite; if not, its lower triangle is spoilt.
    """
    for panel in panels(matrix.shape[0], CORNER):
        below = matrix[panel.start :, panel]
        below.addmm_(matrix[panel.start :, : panel.start], matrix[panel, : panel.start].T, alpha=-1)
        width = panel.stop - panel.start
        lower, info = torch.linalg.cholesky_ex(below[:width])
        if info.item() != 0:
            return False
        below[:width] = lower
        below[width:] = torch.linalg.solve_triangular(lower.T, below[width:], upper=True, left=False)
    return True


def solve(lower: Tensor, rows: Tensor) -> Tensor:
    """Rows · (L Lᵀ)⁻¹, in place.

    Args:
        lower: (n, n) of :func:`factorise`.
        rows: (r, n) contiguous, of the same dtype.
    """
    torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False, out=rows)
    return torch.linalg.solve_triangular(lower, rows, upper=False, left=False, out=rows)
