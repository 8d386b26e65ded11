"""Bases of value dims: between V and O every invertible change of a KV head's dims is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """A change of basis of d value dims, v ← A v.

    Attributes:
        forward: (d, d) A.
        inverse: (d, d) A⁻¹, by which a consumer takes it back: O ← O A⁻¹.
    """

    forward: Tensor
    inverse: Tensor


def principal_basis(gram: Tensor, energy: Tensor, damping: float) -> Basis:
    """The basis in which value dims are uncorrelated, and sorted by what the consumer makes of them.

    With G_λ = G + λI, λ = damping · mean(diag G), and a root of it, S = E √Λ from G_λ = E Λ Eᵀ, the dims are those of
    Sᵀ M S = U D Uᵀ, D descending:

        A = c · Uᵀ S⁻¹,  A⁻¹ = S U / c,  so that  A G_λ Aᵀ = c² I  and  A⁻ᵀ M A⁻¹ = D / c².

    Of one query head and without damping, the first k dims are the best k of any basis, and what is lost with the
    others is the sum of their D (Eckart and Young, of O √G). c² = mean(diag G_λ) leaves values as large as they were.
    The damping bounds the condition of A by √(d / damping + 1), and takes directions that the calibration never went
    in for worth something nevertheless.

    Args:
        gram: (d, d) G = Σ_h Z_h Z_hᵀ over the query heads h that a KV head serves, Z_h the consumer's inputs from h.
        energy: (d, d) M = Σ_h O_hᵀ O_h, O_h the consumer's columns that read them.
        damping: Ridge of the gram as a multiple of its mean diagonal, > 0.

    Returns:
        The change of basis in float64: the identity where nothing ever came in.
    """
    gram, energy = gram.double(), energy.double()
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    mean = gram.diagonal().sum() / max(len(gram), 1)
    if mean <= 0:
        return Basis(eye, eye)
    values, vectors = torch.linalg.eigh(gram + damping * mean * eye)
    lengths = values.clamp_min(damping * mean).sqrt()  # a gram has no negative eigenvalue but for rounding
    root = vectors * lengths
    turn = torch.linalg.eigh(root.T @ energy @ root).eigenvectors.flip(1)
    scale = ((1 + damping) * mean).sqrt()
    return Basis(scale * (turn.T / lengths) @ vectors.T, root @ turn / scale)


def turned(tensor: Tensor, blocks: Sequence[Tensor], dim: int) -> Tensor:
    """A block-diagonal matrix times a tensor: each block acts on its slices of one dimension, one after the other.

    Args:
        tensor: Any floating dtype; the product of a 16-bit one is computed in float32.
        blocks: (d, d) each; their sizes add up to the size of ``dim``.
        dim: The dimension.

    Returns:
        A new tensor of the same shape and dtype.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    parts = tensor.movedim(dim, -1).to(wide).split([len(block) for block in blocks], -1)
    products = [part @ block.T.to(part) for part, block in zip(parts, blocks, strict=True)]
    return torch.cat(products, -1).movedim(-1, dim).to(tensor.dtype).contiguous()


@torch.no_grad()
def turn(parameter: Tensor, index: Tensor, dim: int, basis: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
    """Turn some entries of a parameter in place: data and gradient; the Parameter object stays the same.

    Where w ← T w, what is computed stays the same, and its gradient becomes T⁻ᵀ g.

    Args:
        parameter: Any parameter; its data becomes a new tensor.
        index: (m,) the entries of dimension ``dim`` that the blocks act on, in their order.
        dim: The dimension.
        basis: Blocks of T, and of T⁻ᵀ.
    """
    index = index.to(parameter.device)

    def new(tensor: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        return tensor.index_copy(dim, index, turned(tensor.index_select(dim, index), blocks, dim))

    forward, of_gradients = basis
    parameter.data = new(parameter.data, forward)
    if parameter.grad is not None:
        parameter.grad = new(parameter.grad, of_gradients)
