"""Shrink a parameter in place: data and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Dim = int | tuple[int, int]
"""A dimension, or two that are cut together, such as experts and their hidden units."""


@torch.no_grad()
def shrink(parameter: Tensor, index: Tensor, dim: Dim) -> None:
    """Keep only the entries ``index`` of one dimension; the Parameter object stays the same.

    Identity is kept so that optimizers, schedulers and hooks which hold the parameter stay valid. The new
    storage is compact: the removed memory is freed.

    Args:
        parameter: Any parameter.
        index: (m,) ascending indices into dimension ``dim``; into two dimensions (a, m), see :func:`take`.
        dim: The dimension to shrink, or two.
    """
    gradient = parameter.grad
    parameter.grad = None  # autograd refuses a gradient of another shape
    parameter.data = take(parameter.data, index, dim)
    if gradient is not None:
        parameter.grad = take(gradient, index, dim)


def take(tensor: Tensor, index: Tensor, dim: Dim) -> Tensor:
    """The entries ``index`` of one dimension, or of two that are numbered as one.

    Args:
        tensor: Any tensor.
        index: (m,) indices into dimension ``dim``. Or (a, m) indices into dimensions (d, e) read as one, entry (i, j)
            being i · size(e) + j: for each of a entries along d that are left, its m along e.
        dim: One dimension or two.
    """
    index = index.to(tensor.device)
    if isinstance(dim, int):
        return tensor.index_select(dim, index)
    flat = tensor.movedim(dim, (0, 1)).flatten(0, 1).index_select(0, index.reshape(-1))
    return flat.unflatten(0, index.shape).movedim((0, 1), dim).contiguous()


@torch.no_grad()
def expand(compact: Tensor, index: Tensor, dim: Dim, size: int | Sequence[int]) -> Tensor:
    """Inverse of :func:`shrink` with zeros: put the slices at ``index`` of a zero tensor of size ``size``.

    Args:
        compact: Tensor with m entries in dimension ``dim``, or in both together.
        index: (m,) positions in the full dimension, or in both read as one.
        dim: The dimension to widen, or two.
        size: Full size of that dimension, or of both.

    Returns:
        The widened tensor.
    """
    index, sizes = index.reshape(-1).to(compact.device), (size,) if isinstance(size, int) else tuple(size)
    if isinstance(dim, tuple):
        flat = expand(compact.movedim(dim, (0, 1)).flatten(0, 1), index, 0, math.prod(sizes))
        return flat.unflatten(0, sizes).movedim((0, 1), dim).contiguous()
    shape = list(compact.shape)
    shape[dim] = math.prod(sizes)
    return compact.new_zeros(shape).index_copy_(dim, index, compact)
