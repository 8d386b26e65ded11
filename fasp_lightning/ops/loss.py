"""Loss of next-token prediction, without an fp32 copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fasp_lightning.ops.likelihood import IGNORED, next_targets, next_token_nll, row_chunks, subtract_one_hot


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL of each label but a sequence's first, given the tokens before it.

    The gradient is computed along with the loss, in pieces, and kept in the logits' dtype: with 16-bit logits this
    takes less than half the memory of ``cross_entropy(logits.float(), …)``.

    Args:
        logits: (batch, seq, vocabulary), any floating dtype; computed with in fp32.
        labels: (batch, seq) int64, -100 where nothing is predicted.

    Returns:
        Scalar, fp32; 0 where there is nothing to predict.
    """
    loss: Tensor = _MeanNLL.apply(logits, next_targets(labels))
    return loss


def sequence_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL of each sequence, as in :func:`next_token_loss`.

    Returns:
        (batch,) sums in float64, and (batch,) predicted tokens.
    """
    rows = [next_token_nll(*row) for row in zip(logits.split(1), labels.split(1), strict=True)]
    return torch.stack([nll for nll, _ in rows]), torch.stack([tokens for _, tokens in rows])


class _MeanNLL(torch.autograd.Function):
    """Loss and gradient in one pass: d loss / d logits = (softmax − one-hot) / count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        flat, goals = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        # the softmax of 16-bit logits is computed in fp32
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for rows, goal, slopes in row_chunks(flat, goals, flat if gradient is None else gradient):
            log_probabilities = functional.log_softmax(rows.to(total.dtype), dim=-1)
            total += functional.nll_loss(log_probabilities, goal, ignore_index=IGNORED, reduction="sum")
            if gradient is not None:
                slopes.copy_(subtract_one_hot(log_probabilities.exp_(), goal).mul_((goal != IGNORED)[:, None]))
        count = (goals != IGNORED).sum().clamp(min=1)
        ctx.shape = logits.shape
        ctx.save_for_backward(gradient, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slopes, count = ctx.saved_tensors
        scale, result = gradients[0] / count, torch.empty_like(slopes)
        for slope, piece in row_chunks(slopes, result):
            piece.copy_(slope.to(scale.dtype) * scale)  # the scale itself is not rounded to 16 bits
        return result.reshape(ctx.shape), None
