"""The training loss is the textbook's, in value and gradient, in any pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fasp_lightning.ops import likelihood
from fasp_lightning.ops.loss import next_token_loss, sequence_nll

VOCAB = 11


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 7) labels, some of them ignored, and logits for them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 7, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (2, 7), generator=generator)
    labels[0, :3] = labels[1, 5] = -100
    return logits.to(dtype).requires_grad_(), labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).double(), labels[:, 1:].reshape(-1))


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_cross_entropy(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", rows * VOCAB)
    logits, labels = batch(dtype)
    value = next_token_loss(logits, labels)
    (3 * value).backward()
    expected = reference(logits, labels)
    (slope,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(value, expected.to(dtype))
    torch.testing.assert_close(logits.grad, slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_get_a_gradient_of_their_own_dtype(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    value = next_token_loss(logits, labels)
    value.backward()
    (slope,) = torch.autograd.grad(reference(logits, labels), logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference(logits, labels))
    torch.testing.assert_close(logits.grad, slope, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_a_batch_without_a_prediction_has_loss_zero() -> None:
    logits, labels = batch()
    value = next_token_loss(logits, torch.full_like(labels, -100))
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def test_a_sequence_counts_its_own_tokens() -> None:
    logits, labels = batch()
    nll, tokens = sequence_nll(logits.detach(), labels)
    expected = [reference(logits[i : i + 1], labels[i : i + 1]).item() for i in range(2)]
    assert tokens.tolist() == [4, 5]
    assert all(math.isclose(nll[i] / tokens[i], expected[i], rel_tol=1e-6) for i in range(2))
