"""Shrinking a parameter keeps its identity; expanding undoes it with zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasp_lightning.ops.slicing import expand, shrink


@pytest.mark.parametrize("dim", [0, 1])
def test_shrink_slices_data_and_gradient_of_the_same_parameter(dim: int) -> None:
    parameter = nn.Parameter(torch.randn(5, 6))
    data, gradient = parameter.detach().clone(), torch.randn(5, 6)
    parameter.grad = gradient.clone()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    index = torch.tensor([0, 2, 3])
    shrink(parameter, index, dim)
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert torch.equal(parameter, data.index_select(dim, index))
    assert torch.equal(parameter.grad, gradient.index_select(dim, index))
    optimizer.step()
    assert torch.equal(parameter, (data - gradient).index_select(dim, index))


def test_shrink_frees_what_was_removed() -> None:
    parameter = nn.Parameter(torch.randn(100, 100))
    shrink(parameter, torch.arange(10), 0)
    assert parameter.untyped_storage().nbytes() == 10 * 100 * 4


def test_a_shrunken_parameter_trains() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    shrink(parameter, torch.tensor([1, 2]), 1)
    parameter.sum().backward()
    assert parameter.grad.shape == (4, 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_expand_puts_zeros_where_shrink_cut(dim: int) -> None:
    full = torch.randn(5, 5)
    index = torch.tensor([1, 4])
    widened = expand(full.index_select(dim, index), index, dim, 5)
    mask = torch.zeros(5, dtype=torch.bool)
    mask[index] = True
    mask = mask.unsqueeze(1 - dim)
    assert torch.equal(widened, torch.where(mask, full, torch.zeros(())))
