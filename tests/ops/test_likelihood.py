"""Negative log-likelihood against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasp_lightning.ops import likelihood
from fasp_lightning.ops.likelihood import next_token_nll, next_token_nll_gradient

BATCH, SEQ_LEN, VOCABULARY = 3, 7, 11


def random_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, SEQ_LEN, VOCABULARY, generator=generator).mul(3).to(dtype)
    return logits, torch.randint(VOCABULARY, (BATCH, SEQ_LEN), generator=generator)


def oracle(logits: Tensor, input_ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """The definition, token by token, in float64."""
    log_p = logits.double().log_softmax(-1)
    nll, tokens = 0.0, 0
    for row in range(len(input_ids)):
        for t in range(1, input_ids.shape[1]):
            if mask[row, t - 1] and mask[row, t]:
                nll -= float(log_p[row, t - 1, input_ids[row, t]])
                tokens += 1
    return nll, tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("elements", [1, 3 * VOCABULARY, 2**24])
def test_sum_equals_the_definition(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    logits, input_ids = random_case(dtype)
    nll, tokens = next_token_nll(logits, input_ids)
    expected, count = oracle(logits, input_ids, torch.ones_like(input_ids))
    assert float(nll) == pytest.approx(expected, rel=1e-6)
    assert int(tokens) == count == BATCH * (SEQ_LEN - 1)
    assert nll.dtype == torch.float64


@pytest.mark.parametrize("elements", [3 * VOCABULARY, 2**24])
def test_a_prediction_counts_iff_context_and_target_are_unmasked(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    logits, input_ids = random_case()
    # right padding, left padding, a hole: 4, 4 and 3 predictions
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0]])
    nll, tokens = next_token_nll(logits, input_ids, mask.bool())
    expected, count = oracle(logits, input_ids, mask)
    assert int(tokens) == count == 11
    assert float(nll) == pytest.approx(expected, rel=1e-6)


def test_what_is_masked_changes_nothing() -> None:
    logits, input_ids = random_case()
    mask = torch.ones_like(input_ids)
    mask[:, 4:] = 0
    expected = next_token_nll(logits, input_ids, mask)
    logits[:, 4:] = torch.nan
    input_ids[:, 4:] = -1
    assert next_token_nll(logits, input_ids, mask) == expected


def test_one_token_predicts_nothing() -> None:
    logits, input_ids = random_case()
    nll, tokens = next_token_nll(logits[:, :1], input_ids[:, :1])
    assert (float(nll), int(tokens)) == (0.0, 0)


def test_no_second_copy_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 2 * VOCABULARY)
    sizes = []
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(rows: Tensor, *args: Tensor, **options: str) -> Tensor:
        sizes.append(rows.numel())
        return cross_entropy(rows, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    next_token_nll(*random_case(torch.bfloat16))
    assert max(sizes) == 2 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 3 * VOCABULARY, 2**24])
def test_gradient_is_that_of_the_sum(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded row, one with a hole, one that is all padding; under ``no_grad``, as the engine calls it."""
    logits, input_ids = random_case(dtype)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0], [0] * SEQ_LEN])
    leaf = logits.clone().requires_grad_()
    next_token_nll(leaf, input_ids, mask)[0].backward()
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    with torch.no_grad():
        found = next_token_nll_gradient(logits, input_ids, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found, leaf.grad)
    assert not found[mask == 0].any()


def test_gradient_is_zero_at_masked_positions_whatever_is_there() -> None:
    """Attention over padding alone may leave NaN, and a padding id may lie outside the vocabulary."""
    logits, input_ids = random_case()
    mask = torch.ones_like(input_ids)
    mask[:, 4:] = 0
    expected = next_token_nll_gradient(logits, input_ids, mask)
    logits[:, 4:] = torch.nan
    input_ids[:, 4:] = VOCABULARY
    assert torch.equal(next_token_nll_gradient(logits, input_ids, mask), expected)


def test_gradient_of_one_token_is_zero() -> None:
    logits, input_ids = random_case()
    assert not next_token_nll_gradient(logits[:, :1], input_ids[:, :1]).any()


@pytest.mark.parametrize("shape", [(BATCH, SEQ_LEN + 1), (SEQ_LEN,)])
def test_ids_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must be"):
        next_token_nll(random_case()[0], torch.zeros(shape, dtype=torch.long))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="mask must have the shape"):
        next_token_nll(*random_case(), torch.ones(BATCH, SEQ_LEN - 1))


def test_a_device_without_float64_is_known_by_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is summed there ends up in float64 on the CPU."""
    zeros = torch.zeros

    def refusing(*args: object, **options: object) -> Tensor:
        if options.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*args, **options)

    case = random_case()
    expected, count = next_token_nll(*case)
    likelihood._makes_float64.cache_clear()
    monkeypatch.setattr(torch, "zeros", refusing)
    nll, tokens = next_token_nll(*case)
    likelihood._makes_float64.cache_clear()
    assert (nll.dtype, nll.device.type, int(tokens)) == (torch.float64, "cpu", int(count))
    assert float(nll) == pytest.approx(float(expected), rel=1e-6)
