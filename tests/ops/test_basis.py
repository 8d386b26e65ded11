"""Change of basis: exact in both directions, sorted, bounded, and blind to what never came in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasp_lightning.ops.basis import principal_basis, turn, turned


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(dims: int = 6, tokens: int = 40, rank: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs Z of one query head, of some rank, and the consumer's columns O that read them."""
    return draw(dims, rank, seed=1) @ draw(rank, tokens, seed=2), draw(9, dims, seed=3)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.5])
def test_dims_are_uncorrelated_and_sorted(damping: float) -> None:
    inputs, columns = head()
    gram, energy = inputs @ inputs.T, columns.T @ columns
    basis = principal_basis(gram, energy, damping)
    eye = torch.eye(6, dtype=torch.float64)
    mean = gram.diagonal().mean()
    damped = gram + damping * mean * eye
    torch.testing.assert_close(basis.forward @ basis.inverse, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(basis.forward @ damped @ basis.forward.T, (1 + damping) * mean * eye)
    carried = basis.inverse.T @ energy @ basis.inverse
    found = carried.diagonal()
    torch.testing.assert_close(carried, found.diag(), atol=1e-10 * float(found[0]), rtol=1e-9)
    assert (found[:-1] >= found[1:]).all()


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_first_dims_are_the_best_of_so_many(kept: int) -> None:
    """No matrix of that rank is nearer to what the head gives than the sum of its first dims (oracle: the SVD)."""
    inputs, columns = head()
    basis = principal_basis(inputs @ inputs.T, columns.T @ columns, 1e-12)
    found = (columns @ basis.inverse)[:, :kept] @ (basis.forward @ inputs)[:kept]
    left, values, right = torch.linalg.svd(columns @ inputs, full_matrices=False)
    best = (left * values)[:, :kept] @ right[:kept]
    torch.testing.assert_close(found, best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_condition_is_bounded_by_the_damping(rank: int) -> None:
    inputs, columns = head(rank=rank)
    basis = principal_basis(inputs @ inputs.T, columns.T @ columns, 0.01)
    assert torch.linalg.cond(basis.forward) <= (6 / 0.01 + 1) ** 0.5 + 1e-9
    torch.testing.assert_close(basis.inverse @ basis.forward, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)


def test_nothing_is_turned_where_nothing_came_in() -> None:
    for dims in (0, 4):
        basis = principal_basis(torch.zeros(dims, dims), torch.eye(dims), 0.01)
        assert all(torch.equal(one, torch.eye(dims, dtype=torch.float64)) for one in basis)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_blocks_turn_their_slices(dim: int, dtype: torch.dtype) -> None:
    blocks = [draw(3, 3, seed=1), draw(0, 0), draw(2, 2, seed=2)]
    tensor = draw(5, 5, 5, seed=3).to(dtype)
    whole = torch.block_diag(*blocks)
    expected = torch.tensordot(whole, tensor.double(), dims=([1], [dim])).movedim(0, dim)
    found = turned(tensor, blocks, dim)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


def test_parameter_is_turned_with_its_gradient() -> None:
    """The loss as a function of the turned parameter has the turned gradient (autograd); other entries stay."""
    weight, change = nn.Parameter(draw(7, 2)), draw(4, 4, seed=1)
    index, data = torch.tensor([0, 2, 3, 6]), weight.detach().clone()

    def loss(value: Tensor) -> Tensor:
        return (value * draw(7, 2, seed=2)).sin().sum()

    loss(weight).backward()
    turn(weight, index, 0, ([change], [torch.linalg.inv(change).T]))
    whole = torch.eye(7, dtype=torch.float64)
    whole[index[:, None], index] = change
    torch.testing.assert_close(weight.detach(), whole @ data)
    again = weight.detach().clone().requires_grad_()
    loss(torch.linalg.inv(whole) @ again).backward()
    torch.testing.assert_close(weight.grad, again.grad)
