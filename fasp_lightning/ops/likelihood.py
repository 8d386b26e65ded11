"""Negative log-likelihood of token ids under a causal model's logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 2**24
"""Logits handled at once: their float32 copy and its softmax take 64 MiB each, whatever the vocabulary."""


def next_token_nll(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum −log p(x_t | x_<t) over the tokens that are predicted: t = 2 … T of each sequence.

    Position t − 1 of the logits predicts token t. A prediction counts iff its target and the token it is made
    at are both unmasked. The logits are never copied as a whole.

    Args:
        logits: (batch, seq, vocabulary), any floating dtype.
        input_ids: (batch, seq) int64. Ids at masked positions may be anything.
        mask: (batch, seq), true or non-zero at tokens, false or zero at padding; None means no padding.

    Returns:
        The summed NLL (scalar, float64, in nats) and the number of predicted tokens (scalar, int64), on the
        device of the logits.

    Raises:
        ValueError: If the shapes don't match.
    """
    _check_shapes(logits, input_ids, mask)
    nll = torch.zeros((), dtype=torch.float64, device=logits.device)
    tokens = torch.zeros((), dtype=torch.int64, device=logits.device)
    positions = max(1, CHUNK_ELEMENTS // max(1, logits.shape[2]))
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 1, positions):
            end = min(start + positions, logits.shape[1] - 1)
            context, targets = logits[row, start:end], input_ids[row, start + 1 : end + 1]
            if mask is not None:
                counts = mask[row, start:end].bool() & mask[row, start + 1 : end + 1].bool()
                context, targets = context[counts], targets[counts]
            # the softmax of 16-bit logits is computed in fp32; the sum over a corpus needs fp64
            losses = functional.cross_entropy(context.float(), targets, reduction="none")
            nll += losses.sum(dtype=torch.float64)
            tokens += targets.numel()
    return nll, tokens


def next_token_nll_gradient(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """∂ NLL / ∂ logits of :func:`next_token_nll`.

    Autograd over all the logits would keep a float32 softmax as large as they are; here it goes piece by piece.

    Args:
        logits: As in :func:`next_token_nll`; whether they require gradients does not matter.
        input_ids: As there.
        mask: As there.

    Returns:
        (batch, seq, vocabulary) gradient in the dtype of the logits, zero where nothing is predicted.

    Raises:
        ValueError: If the shapes don't match.
    """
    _check_shapes(logits, input_ids, mask)
    gradient = torch.zeros_like(logits, requires_grad=False)
    positions = max(1, CHUNK_ELEMENTS // max(1, logits.shape[2]))
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 1, positions):
            # one position more, for its target: it predicts nothing in this piece, and is the next one's first
            piece = slice(row, row + 1), slice(start, start + positions + 1)
            leaf = logits[piece].detach().requires_grad_()
            with torch.enable_grad():
                nll, _ = next_token_nll(leaf, input_ids[piece], None if mask is None else mask[piece])
            gradient[piece] = torch.autograd.grad(nll, leaf)[0]
    return gradient


def _check_shapes(logits: Tensor, input_ids: Tensor, mask: Tensor | None) -> None:
    if logits.ndim != 3 or input_ids.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be (batch, seq, vocabulary) and input_ids (batch, seq), "
            f"got {tuple(logits.shape)} and {tuple(input_ids.shape)}"
        )
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"mask must have the shape {tuple(input_ids.shape)} of input_ids, got {tuple(mask.shape)}"
        )
