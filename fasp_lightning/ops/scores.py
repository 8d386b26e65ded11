"""Column scores: one function a score. A column with the lowest score goes first."""

from __future__ import annotations

import torch
from torch import Tensor


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """Wanda metric summed over a column, s_j = Σ_i |W_ij| · ‖X_j‖₂ (FASP, section 3; Sun et al., 2023).

    Args:
        weight: (out, n) consumer weight.
        norms: (n,) norms of the consumer's input columns over the calibration tokens.

    Returns:
        (n,) scores in float64.
    """
    return magnitude_score(weight) * norms.double()


def magnitude_score(weight: Tensor) -> Tensor:
    """Sum of a column's magnitudes, s_j = Σ_i |W_ij|; needs no calibration.

    Args:
        weight: (out, n) consumer weight.

    Returns:
        (n,) scores in float64.
    """
    return weight.abs().sum(0, dtype=torch.float64)
