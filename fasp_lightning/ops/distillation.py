"""Divergence of a causal model's predictions from a teacher's, without a copy of either's logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.likelihood import IGNORED, next_targets, row_chunks, subtract_one_hot

CHUNK_ELEMENTS = 2**21
"""Logits handled at once: a handful of float32 pieces of 8 MiB each, whatever the vocabulary."""


class TopK(NamedTuple):
    """The likeliest tokens of a teacher's predictions; the others are one more outcome, which has the rest's mass.

    Attributes:
        log_probabilities: (batch, seq, k), over the whole vocabulary and at the loss's temperature.
        tokens: (batch, seq, k) int64.
    """

    log_probabilities: Tensor
    tokens: Tensor


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens of each prediction.

    Args:
        logits: (batch, seq, vocabulary).
        k: Fewer than the vocabulary has.
        temperature: Logits are divided by it.

    Returns:
        Log-probabilities in fp32 (fp64 of fp64 logits), and tokens.

    Raises:
        FaspError: If the vocabulary has no more than ``k``.
    """
    if not 1 <= k < logits.shape[-1]:
        raise FaspError(f"top_k must be at least 1 and less than the vocabulary of {logits.shape[-1]}, got {k}")
    flat = logits.reshape(-1, logits.shape[-1])
    values = flat.new_empty((len(flat), k), dtype=_wide(logits.dtype))
    tokens = flat.new_empty((len(flat), k), dtype=torch.int64)
    for rows, value, token in row_chunks(flat, values, tokens, elements=CHUNK_ELEMENTS):
        torch.topk(_log_softmax(rows, temperature), k, out=(value, token))
    return TopK(values.reshape(*logits.shape[:-1], k), tokens.reshape(*logits.shape[:-1], k))


def distillation_loss(
    logits: Tensor, teacher: Tensor | TopK, labels: Tensor, temperature: float = 1.0, label_weight: float = 0.0
) -> Tensor:
    """Mean over the predicted tokens of (1 − w) T² KL(teacher ‖ student) + w NLL (Hinton et al., arXiv:1503.02531).

    KL(p ‖ q) = Σ p (log p − log q), forward, of both softmaxes at temperature T; of a :class:`TopK` the sum runs over
    its tokens and all others together, which is a true divergence, and at most the whole one. Forward and backward
    go through the logits in pieces: beside the gradient, they take less than 64 MiB.

    Args:
        logits: (batch, seq, vocabulary) of the student, any floating dtype; computed with in fp32.
        teacher: Its logits, of the same shape, or the likeliest tokens of each prediction. It gets no gradient.
        labels: (batch, seq) int64, −100 where nothing is predicted; a sequence's first label is never predicted.
        temperature: T, positive.
        label_weight: w, from 0 to 1.

    Returns:
        Scalar, fp32; 0 where there is nothing to predict.

    Raises:
        FaspError: If the shapes don't match.
    """
    given = teacher.tokens if isinstance(teacher, TopK) else teacher
    if given.shape[:2] != logits.shape[:2] or labels.shape != logits.shape[:2]:
        raise FaspError(
            "logits, teacher and labels must agree in (batch, seq), got "
            f"{tuple(logits.shape[:2])}, {tuple(given.shape[:2])} and {tuple(labels.shape)}"
        )
    if not isinstance(teacher, TopK) and teacher.shape != logits.shape:
        raise FaspError(
            f"teacher must predict the {logits.shape[-1]} tokens of the student's vocabulary, got {teacher.shape[-1]}"
        )
    targets = next_targets(labels)
    parts = tuple(teacher) if isinstance(teacher, TopK) else (teacher,)
    loss: Tensor = _Distillation.apply(temperature, label_weight, logits, targets, *(part.detach() for part in parts))
    return loss


class _Distillation(torch.autograd.Function):
    """Loss and gradient in one pass; the gradient waits in the logits' dtype and is scaled where it stands."""

    @staticmethod
    def forward(
        ctx: Any, temperature: float, label_weight: float, logits: Tensor, targets: Tensor, *teacher: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total = torch.zeros((), dtype=_wide(logits.dtype), device=logits.device)
        count = (targets != IGNORED).sum().clamp(min=1)
        for rows, goals, slopes, *known in _pieces(logits, targets, (gradient, *teacher)):
            log_student, ignored = _log_softmax(rows, temperature), goals == IGNORED
            loss, slope = _divergence(log_student, known, temperature)
            total += (1 - label_weight) * temperature**2 * loss.masked_fill_(ignored, 0).sum()
            slope.mul_((1 - label_weight) * temperature)
            if label_weight:
                log_student = _log_softmax(rows)
                nll = functional.nll_loss(log_student, goals, ignore_index=IGNORED, reduction="sum")
                total += label_weight * nll
                slope += subtract_one_hot(log_student.exp_(), goals).mul_(label_weight)
            slopes.copy_(slope.masked_fill_(ignored[:, None], 0).div_(count))
        ctx.save_for_backward(gradient if ctx.needs_input_grad[2] else None)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors  # a second backward pass through it is an error of autograd's, not a wrong result
        return None, None, slopes.mul_(gradients[0]), None, *(None for _ in ctx.needs_input_grad[4:])


def _divergence(log_student: Tensor, teacher: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """(n,) KL of each row, and (n, vocabulary) T ∂KL/∂logits, softmax of the student minus that of the teacher."""
    if len(teacher) == 2:
        return _divergence_of_likeliest(log_student, *teacher)
    log_teacher = _log_softmax(teacher[0], temperature)
    kl = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return kl, log_student.exp_().sub_(log_teacher.exp_())


def _divergence_of_likeliest(log_student: Tensor, log_teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a :class:`TopK`, whose rest the student divides: ∂ log q_rest / ∂ z = q / q_rest."""
    log_rest, log_student_rest = _log_rest(log_teacher), _rest(log_student, tokens)
    kl = (log_teacher.exp() * (log_teacher - log_student.gather(1, tokens))).sum(-1)
    kl += (log_rest.exp() * (log_rest - log_student_rest)).masked_fill(log_rest.isneginf(), 0)
    student, share = log_student.exp_(), (log_rest - log_student_rest).exp()
    known = student.gather(1, tokens) - log_teacher.exp()
    return kl, student.mul_(1 - share[:, None]).scatter_(1, tokens, known)


def _log_rest(log_teacher: Tensor) -> Tensor:
    """(n,) logarithm of the mass that is not among the likeliest tokens; −∞ where they hold all of it."""
    return (1 - log_teacher.exp().sum(-1)).clamp_(min=0).log_()


def _rest(log_student: Tensor, tokens: Tensor) -> Tensor:
    """(n,) logarithm of what the student gives all other tokens."""
    return log_student.scatter(1, tokens, -torch.inf).logsumexp(-1)


def _pieces(logits: Tensor, targets: Tensor, others: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the logits, their targets, and the same rows of others."""
    flat = (part.reshape(-1, part.shape[-1]) for part in others)
    return row_chunks(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), *flat, elements=CHUNK_ELEMENTS)


def _log_softmax(rows: Tensor, temperature: float = 1.0) -> Tensor:
    return functional.log_softmax(rows.to(_wide(rows.dtype)) / temperature, dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32, in which the softmax of 16-bit logits is computed."""
    return torch.promote_types(dtype, torch.float32)
