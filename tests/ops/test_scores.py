"""Scores against their definition."""

from __future__ import annotations

import pytest
import torch

from fasp_lightning.ops.scores import fisher_score

TOKENS, WIDTH = 13, 5


def rows(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fisher_score_is_the_sum_of_squared_products(dtype: torch.dtype) -> None:
    inputs, gradients = rows(0).to(dtype), rows(1).to(dtype)
    expected = [sum((float(inputs[t, j]) * float(gradients[t, j])) ** 2 for t in range(TOKENS)) for j in range(WIDTH)]
    found = fisher_score(inputs, gradients)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-14 if dtype == torch.float64 else 1e-6)


def test_fisher_score_leaves_its_arguments_as_they_are() -> None:
    inputs, gradients = rows(0), rows(1)
    fisher_score(inputs, gradients)
    assert torch.equal(inputs, rows(0))
    assert torch.equal(gradients, rows(1))


def test_small_16_bit_gradients_do_not_vanish() -> None:
    tiny = torch.full((1, 1), 2.0**-20, dtype=torch.float16)  # its square is not a float16
    assert fisher_score(torch.ones_like(tiny), tiny).item() == 2.0**-40
