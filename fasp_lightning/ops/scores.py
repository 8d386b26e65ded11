"""Column scores, one function a score: a column with the lowest goes first; and how much a whole block does."""

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


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """How much a block turns each token's state, 1 − xᵀy / (‖x‖ ‖y‖) (Block Influence; Men et al., arXiv:2403.03853).

    Args:
        inputs: (…, hidden) what the block is given, x, any floating dtype.
        outputs: (…, hidden) what it returns, y.

    Returns:
        (…) from 0 to 2, in float64.
    """
    return 1 - torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)


def routed_score(outputs: Tensor, weights: Tensor) -> Tensor:
    """What an expert gives the tokens that it is sent, Σ_t g_t · ‖f(x_t)‖₂ (REAP; Lasby et al., 2025).

    The score of a whole expert is the mean over these tokens.

    Args:
        outputs: (tokens, out) f(x), what the expert makes of each token.
        weights: (tokens,) g, the router's weight of each.

    Returns:
        () float64.
    """
    return (outputs.float().norm(dim=1).double() * weights.double()).sum()


def fisher_score(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Loss sensitivity of a column, s_j = Σ_t (x_tj · ∂L/∂x_tj)² (Fisher pruning; Theis et al., 2018).

    A factor is what the loss L changes by, to first order, when the column's input at token t goes; the squares are
    summed since such changes cancel out in their plain sum. A column that is scaled up against smaller weights keeps
    its score.

    Args:
        inputs: (tokens, n) consumer inputs X, any floating dtype.
        gradients: (tokens, n) ∂L/∂X. 16-bit values are multiplied, and summed up, in float32.

    Returns:
        (n,) scores in float64.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return (inputs.to(wide) * gradients).square().sum(0).double()
