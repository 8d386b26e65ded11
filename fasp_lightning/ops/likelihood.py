"""Negative log-likelihood of token ids under a causal model's logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fasp_lightning.errors import FaspError

IGNORED = -100
"""The label of a token that no loss and no metric counts, as in PyTorch's and transformers' losses."""

CHUNK_ELEMENTS = 2**24
"""Logits handled at once: their float32 copy and its softmax take 64 MiB each, whatever the vocabulary."""


def next_token_nll(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum −log p(x_t | x_<t) over the tokens that are predicted: t = 2 … T of each sequence.

    Position t − 1 of the logits predicts token t. A prediction counts iff its target and the token it is made
    at are both unmasked, and the target is not :data:`IGNORED`. The logits are never copied as a whole.

    Args:
        logits: (batch, seq, vocabulary), any floating dtype.
        input_ids: (batch, seq) int64 token ids, or labels. Ids at masked positions may be anything.
        mask: (batch, seq), true or non-zero at tokens, false or zero at padding; None means no padding.

    Returns:
        The summed NLL (scalar, float64, in nats; on the CPU where the device has no float64) and the number of
        predicted tokens (scalar, int64), on the device of the logits.

    Raises:
        FaspError: If the shapes don't match.
    """
    _check_shapes(logits, input_ids, mask)
    wide = torch.float64 if has_float64(logits.device) else torch.float32
    sums = [torch.zeros((), dtype=wide, device=logits.device)]
    tokens = torch.zeros((), dtype=torch.int64, device=logits.device)
    for row, positions, targets in _predictions(logits, input_ids, mask):
        # the softmax of 16-bit logits is computed in fp32; the sum over a corpus needs fp64
        losses = functional.cross_entropy(logits[row, positions].float(), targets, reduction="none")
        sums.append(losses.sum(dtype=wide))
        tokens += (targets != IGNORED).sum()
    whole = torch.stack(sums)
    return (whole if has_float64(whole.device) else whole.cpu().double()).sum(), tokens


@torch.no_grad()
def next_token_nll_gradient(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """∂ NLL / ∂ logits of :func:`next_token_nll`, softmax(logits) − 1 at the target.

    Written out, it takes a fourth of the time of autograd, which would also keep a float32 softmax of all the logits.

    Args:
        logits: As in :func:`next_token_nll`.
        input_ids: As there.
        mask: As there.

    Returns:
        (batch, seq, vocabulary) gradient in the dtype of the logits, zero where nothing is predicted.

    Raises:
        FaspError: If the shapes don't match.
    """
    _check_shapes(logits, input_ids, mask)
    gradient, targets = torch.empty_like(logits), input_ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, :-1].bool() & mask[:, 1:].bool()), IGNORED)
    ignored = targets == IGNORED
    predicting = gradient[:, :-1]
    for sequence in zip(logits[:, :-1], targets, predicting, strict=True):
        for rows, goals, slopes in row_chunks(*sequence):
            slopes.copy_(subtract_one_hot(rows.float().softmax(-1), goals))
    gradient[:, -1:] = 0
    if ignored.any():
        predicting.masked_fill_(ignored[..., None], 0)
    return gradient


def next_targets(labels: Tensor) -> Tensor:
    """(batch, seq): at each position the label that follows it, :data:`IGNORED` at the last."""
    return functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64; on MPS they cannot."""
    return _makes_float64(device.type)


@functools.cache
def _makes_float64(device: str) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, NotImplementedError):
        return False
    return True


def subtract_one_hot(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the NLL by the logits, from their softmax, in place: softmax − 1 at the target.

    Args:
        probabilities: (n, vocabulary) softmax of the logits.
        targets: (n,) int64 token ids, or :data:`IGNORED`.

    Returns:
        ``probabilities``, changed. Rows whose target is :data:`IGNORED` hold no gradient and are the caller's to clear.
    """
    ones = torch.ones_like(probabilities[:, :1])
    return probabilities.scatter_add_(1, targets.clamp(min=0)[:, None], -ones)


def row_chunks(*tensors: Tensor, elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors with the same number of rows into chunks of rows: views, at most ``elements`` of the first."""
    rows = max(1, elements // max(1, tensors[0].shape[-1]))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _predictions(
    logits: Tensor, input_ids: Tensor, mask: Tensor | None
) -> Iterator[tuple[int, slice | Tensor, Tensor]]:
    """Predictions in pieces of ``CHUNK_ELEMENTS`` logits: the row, the positions they are made at, their targets."""
    size = max(1, CHUNK_ELEMENTS // max(1, logits.shape[2]))
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 1, size):
            end = min(start + size, logits.shape[1] - 1)
            targets = input_ids[row, start + 1 : end + 1]
            if mask is None:
                yield row, slice(start, end), targets
            else:
                counts = mask[row, start:end].bool() & mask[row, start + 1 : end + 1].bool()
                yield row, start + counts.nonzero().squeeze(1), targets[counts]


def _check_shapes(logits: Tensor, input_ids: Tensor, mask: Tensor | None) -> None:
    if logits.ndim != 3 or input_ids.shape != logits.shape[:2]:
        raise FaspError(
            "logits must be (batch, seq, vocabulary) and input_ids (batch, seq), "
            f"got {tuple(logits.shape)} and {tuple(input_ids.shape)}"
        )
    if mask is not None and mask.shape != input_ids.shape:
        raise FaspError(f"mask must have the shape {tuple(input_ids.shape)} of input_ids, got {tuple(mask.shape)}")
