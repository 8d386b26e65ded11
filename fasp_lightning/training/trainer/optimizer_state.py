"""Optimizer state is cut like its parameter: check whether an optimizer allows it, cut, and restart."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.ops.slicing import Dim, take
from fasp_lightning.training.sharding.weights import resharded

PROBE_SHAPE = (64, 129)
"""Shape of the weight on which an optimizer is tried: two different sizes, no multiple of a block of quantised state,
and large enough for 8-bit optimizers to use 8 bits."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state has no known shape rule, by trying a new one of its class on a small weight.

    The rule: a state tensor has the shape of its parameter, or is a scalar. Factored (Adafactor) and blockwise
    quantised (8-bit) states do not follow it.

    Args:
        optimizer: As ``configure_optimizers`` made it; it is not touched.

    Raises:
        FaspError: If a state does not follow the rule, or the class cannot be tried.
    """
    name = type(optimizer).__name__
    remedy = "use an optimizer with elementwise state, such as torch.optim.AdamW or SGD"

    def refusal(error: Exception) -> FaspError:
        return FaspError(f"optimizer {name} cannot be tried on one weight ({one_line(error)[:120]}); {remedy}")

    with as_refusal(refusal):  # of a class that needs a closure, sparse gradients, a process group
        state = _state_of_probe(optimizer)
    for key, value in state.items():
        if not _follows_rule(value):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise FaspError(
                f"optimizer {name} must have state of its weight's shape {PROBE_SHAPE}, got {key} of {found}; {remedy}"
            )


def _state_of_probe(optimizer: Optimizer) -> dict[str, Any]:
    """State of one weight after one step of a new optimizer with the same settings."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    device = next(parameter.device for group in optimizer.param_groups for parameter in group["params"])
    weight = nn.Parameter(torch.zeros(PROBE_SHAPE, device=device))
    weight.grad = torch.ones_like(weight)
    probe = type(optimizer)([weight], **settings)
    with torch.enable_grad():
        probe.step()
    return dict(probe.state[weight])


def _follows_rule(value: Any) -> bool:
    if type(value) in (Tensor, nn.Parameter):
        return value.numel() == 1 or (value.shape == PROBE_SHAPE and value.is_floating_point())
    return value is None or isinstance(value, (bool, int, float))


@torch.no_grad()
def slice_states(optimizers: Iterable[Optimizer], slices: Iterable[tuple[Tensor, Dim, Tensor]]) -> None:
    """Cut the optimizer state of parameters that were cut.

    Args:
        optimizers: All optimizers of the run; what they do not hold is passed over.
        slices: For each cut its parameter, the dimension, and the positions in it that were kept.
    """
    states = [optimizer.state for optimizer in optimizers]
    for parameter, dim, index in slices:
        for state in states:
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    state[parameter][key] = resharded(value, partial(take, index=index, dim=dim))


def restart_states(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Drop the optimizer state of parameters that were turned to another basis: it starts anew with their next step.

    A sum of gradients could be turned along, one of their squares could not: an entry of the turned gradient is a sum
    of several old ones, and the square of a sum needs their products, which no optimizer keeps.

    Args:
        optimizers: All optimizers of the run; what they do not hold is passed over.
        parameters: Those that were turned.
    """
    states = [optimizer.state for optimizer in optimizers]
    for parameter in parameters:
        for state in states:
            state.pop(parameter, None)
