"""Which rows of a linear layer reach which columns of a later one, found by changing them on a twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.structure.inferring.twin import random_tokens
from fasp_lightning.structure.modes import hooked
from fasp_lightning.structure.resolve import is_linear
from fasp_lightning.structure.spec import CoupledPair

LENGTH = 8
"""Tokens of the sequence that is run; rows behind a ReLU are not dead on all of them."""

CHANGE = 20.0
"""What is added to an output, more at later tokens: a key that changes alike at all of them changes no attention."""


@dataclass
class Trace:
    """What one linear layer of a block reaches within the block.

    Attributes:
        rows: Its outputs.
        reached: Path of each linear layer that is called after it → (rows, columns) whether a row changes a column.
        crossing: Paths of those that it changes at tokens after the one at which it was changed.
    """

    rows: int
    reached: dict[str, Tensor] = field(default_factory=dict)
    crossing: set[str] = field(default_factory=set)


class _Enough(Exception):  # no error: it ends a forward
    pass


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block, by path."""
    return {path: module for path, module in block.named_modules() if is_linear(module)}


def is_transposed(linear: nn.Module) -> bool:
    """Whether a layer's weight is stored (in, out), as in ``Conv1D``."""
    return not isinstance(linear, nn.Linear) and hasattr(linear, "nf")


def trace_block(model: Any, block: nn.Module) -> dict[str, Trace]:
    """Trace every linear layer of a block of a twin that its forward calls.

    Args:
        model: The twin.
        block: One of its blocks.

    Returns:
        Path of a linear layer → what it reaches, in the order of the calls.
    """
    tokens = random_tokens(model, 1, LENGTH)
    inputs = _inputs(model, block, tokens, {})
    return {path: _trace(model, block, path, list(inputs), tokens) for path in inputs}


def _trace(model: Any, block: nn.Module, path: str, order: list[str], tokens: Tensor) -> Trace:
    linear = block.get_submodule(path)
    weight: Any = linear.weight
    rows = weight.shape[1] if is_transposed(linear) else weight.shape[0]
    found = Trace(rows)
    after = order[order.index(path) + 1 :]
    everywhere = _inputs(model, block, tokens.expand(rows + 1, -1), {path: slice(None)})
    at_first = _inputs(model, block, tokens.expand(rows + 1, -1), {path: slice(0, 1)})
    for other in after:
        found.reached[other] = _changed(everywhere[other]).any(1)
        if _changed(at_first[other])[:, 1:].any():
            found.crossing.add(other)
    return found


def _changed(inputs: Tensor) -> Tensor:
    """(rows, tokens, columns) whether an input differs from that of the last sequence, which nothing was changed in."""
    same = inputs[-1:]
    return (inputs[:-1] - same).abs() > 1e-4 * (1 + same.abs())


@torch.no_grad()
def _inputs(model: Any, block: nn.Module, tokens: Tensor, change: dict[str, slice]) -> dict[str, Tensor]:
    """(batch, seq, columns) inputs of a block's linear layers, by path, in the order of their calls.

    Args:
        model: The twin.
        block: The block.
        tokens: (batch, seq) what it is run on.
        change: Path of a layer → tokens at which its output i is changed in sequence i.
    """
    seen: dict[str, Tensor] = {}
    linears = linears_of(block)

    def note(path: str, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if given.shape[:-1].numel() == tokens.numel():  # some flatten their tokens
            seen.setdefault(path, given.reshape(*tokens.shape, -1).clone())

    def shift(where: slice, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = torch.arange(output.shape[-1])
        changed = output.reshape(*tokens.shape, -1).clone()
        changed[rows, where, rows] += CHANGE * torch.linspace(1, 2, LENGTH, dtype=output.dtype)[where]
        return changed.reshape(output.shape)

    def stop(*_: Any) -> None:
        raise _Enough

    before = [(module, partial(note, path)) for path, module in linears.items()]
    after: list[Any] = [(linears[path], partial(shift, where)) for path, where in change.items()]
    with _until_stopped(), hooked(before=before, after=[*after, (block, stop)]):
        model(input_ids=tokens, use_cache=False)
    return seen


@contextmanager
def _until_stopped() -> Iterator[None]:
    with suppress(_Enough):
        yield


def has_traced(traced: dict[str, Trace], pair: CoupledPair) -> bool:
    """Whether a block that was traced calls all layers of a pair."""
    return pair.consumer in traced and all(path in traced for path in pair.producers)


def is_sparse(reached: Tensor) -> bool:
    """Whether rows reach some columns, and none of them more than half; behind a ReLU a few are always out of reach."""
    most = int(reached.sum(1).max())
    return 0 < most <= reached.shape[1] / 2
