"""Optimizers whose state follows a cut are taken, others refused by name; and the cut itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fasp_lightning.training.trainer.optimizer_state import check_optimizer, restart_states, slice_states


def weight() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 3))]


ELEMENTWISE = ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_taken(name: str) -> None:
    optimizer = getattr(torch.optim, name)(weight(), lr=1e-3)
    before = str(optimizer.state)
    check_optimizer(optimizer)
    assert str(optimizer.state) == before  # the optimizer itself was not touched


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: torch.optim.LBFGS(weight()),
        lambda: torch.optim.SparseAdam(weight()),
        lambda: transformers.Adafactor(weight()),
    ],
    ids=["LBFGS", "SparseAdam", "transformers.Adafactor"],
)
def test_other_optimizers_are_refused_by_name(optimizer: Any) -> None:
    made = optimizer()
    with pytest.raises(ValueError, match=f"optimizer {type(made).__name__} "):
        check_optimizer(made)


def test_blockwise_quantised_state_is_refused() -> None:
    class Adam8bit(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, {"lr": lr})

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["state1"] = torch.zeros_like(parameter, dtype=torch.uint8)
                state["absmax1"] = torch.zeros(parameter.numel() // 256)

    with pytest.raises(ValueError, match="optimizer Adam8bit must have state"):
        check_optimizer(Adam8bit(weight()))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_state_is_cut_where_its_parameter_is(name: str) -> None:
    """Rows 0 and 3 of the first weight stay; step counts and the second weight's state are as they were."""
    first, second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([first, second], lr=1e-3, **options)
    (first.square().sum() + second.square().sum()).backward()
    optimizer.step()
    before = {one: dict(optimizer.state[one]) for one in (first, second)}
    first.data = first.data[[0, 3]]
    slice_states([optimizer], [(first, 0, torch.tensor([0, 3]))])
    for key, value in before[first].items():
        expected = value[[0, 3]] if isinstance(value, torch.Tensor) and value.ndim == 2 else value
        torch.testing.assert_close(optimizer.state[first][key], expected, atol=0, rtol=0)
    assert all(optimizer.state[second][key] is value for key, value in before[second].items())


def test_parameter_without_state_is_passed_over() -> None:
    (parameter,) = weight()
    optimizer = torch.optim.AdamW([parameter])
    slice_states([optimizer], [(parameter, 1, torch.tensor([0]))])
    assert parameter not in optimizer.state


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_state_of_a_turned_parameter_starts_anew(name: str) -> None:
    """Its next step is a new optimizer's first; those of others go on."""
    first, second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    options = {"lr": 1e-3, "momentum": 0.9} if name == "SGD" else {"lr": 1e-3}
    make = getattr(torch.optim, name)
    optimizer = make([first, second], **options)
    (first.square().sum() + second.square().sum()).backward()
    optimizer.step()
    kept = optimizer.state[second]
    restart_states([optimizer], [first])
    assert optimizer.state[second] is kept
    copy = nn.Parameter(first.detach().clone())
    copy.grad = first.grad.clone()
    optimizer.step()
    make([copy], **options).step()
    assert torch.equal(first, copy)
