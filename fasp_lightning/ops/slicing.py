"""Shrink a parameter in place: data and gradient."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def shrink(parameter: Tensor, index: Tensor, dim: int) -> None:
    """Keep only the entries ``index`` of one dimension; the Parameter object stays the same.

    Identity is kept so that optimizers, schedulers and hooks which hold the parameter stay valid. The new
    storage is compact: the removed memory is freed.

    Args:
        parameter: Any parameter.
        index: (m,) ascending indices into dimension ``dim``.
        dim: The dimension to shrink.
    """
    index = index.to(parameter.device)
    gradient = parameter.grad
    parameter.grad = None  # autograd refuses a gradient of another shape
    parameter.data = parameter.data.index_select(dim, index)
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index)


@torch.no_grad()
def expand(compact: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    """Inverse of :func:`shrink` with zeros: put the slices at ``index`` of a zero tensor of size ``size``.

    Args:
        compact: Tensor with m entries in dimension ``dim``.
        index: (m,) positions in the full dimension.
        dim: The dimension to widen.
        size: Full size of that dimension.

    Returns:
        The widened tensor.
    """
    shape = list(compact.shape)
    shape[dim] = size
    return compact.new_zeros(shape).index_copy_(dim, index.to(compact.device), compact)
