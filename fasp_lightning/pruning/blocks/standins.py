"""Temporary modules that stand in for parts of a block while it is replayed.

A block is called with what the model called it with; the parts that are not wanted in that call are replaced:

=============  ==================================================================================
stand-in       takes the place of
=============  ==================================================================================
``Recorder``   a consumer: hands its input to the statistics, and returns zeros
``Narrow``     a producer whose pair is skipped: two columns instead of thousands
``Fixed``      a consumer (or attention module) whose output is known already
``Unrouted``   experts: hands on what they are called with, and returns zeros
``Tap``        the attention module: runs it, and hands its output on
``BlockTap``   a whole block: notes what it was called with, and lets the hidden states through
=============  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.structure.compact import replace_module
from fasp_lightning.structure.modes import undone


class StandIn(nn.Module):
    """Base: attributes that the model's code reads from the original are read from the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not registered: its parameters stay the model's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class Recorder(StandIn):
    """Stands in for a consumer: ``sink`` gets the inputs (…, columns left); the output is zero.

    With zeros for the consumer's output, what the surrounding module returns is its own addition (a residual inside
    the attention module, or nothing), to which the finished output is added later.
    """

    def __init__(self, original: nn.Module, outputs: int, sink: Callable[[Tensor], None]) -> None:
        super().__init__(original)
        self.outputs = outputs
        self.sink = sink

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) → zeros (…, out)."""
        self.sink(inputs)
        return inputs.new_zeros(*inputs.shape[:-1], self.outputs)


class Unrouted(StandIn):
    """Stands in for experts: ``sink`` gets what they are called with; the output is zero."""

    def __init__(self, original: nn.Module, sink: Callable[..., None] = lambda *_: None) -> None:
        super().__init__(original)
        self.sink = sink

    def forward(self, hidden: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """(tokens, hidden), chosen experts, their weights → zeros (tokens, hidden)."""
        self.sink(hidden, *args, *kwargs.values())
        return torch.zeros_like(hidden)


class Narrow(StandIn):
    """Stands in for the producer of a skipped pair; two columns, since a fused producer is split in two."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) → (…, 2)."""
        return inputs[..., :2]


class Fixed(StandIn):
    """Returns what was set as ``value``, whatever it is called with."""

    value: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The finished output."""
        value, self.value = self.value, None  # not kept alive longer than needed
        return value


class Tap(StandIn):
    """Runs the original, and keeps its output in ``value``."""

    value: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's output."""
        self.value = self.__dict__["original"](*args, **kwargs)
        return self.value


class BlockTap(StandIn):
    """Stands in for a block while the model's own forward runs: ``sink`` gets its call; the input goes through.

    The first block is run once, to learn whether a block returns a tensor or a tuple.

    Args:
        original: The block.
        sink: Called with the positional and the named arguments of each call.
        shape: Shared by the stand-ins of all blocks: empty, or the skeleton of a block's output once it is known.
    """

    def __init__(self, original: nn.Module, sink: Callable[[tuple[Any, ...], dict[str, Any]], None], shape: list[Any]):
        super().__init__(original)
        self.sink = sink
        self.shape = shape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, as the block would return them."""
        self.sink(args, kwargs)
        if not self.shape:
            self.shape.append(skeleton(self.__dict__["original"](*args, **kwargs)))
        hidden = args[0] if args else kwargs["hidden_states"]
        return with_first(self.shape[0], hidden)


def skeleton(output: Any) -> Any:
    """The skeleton of a module's output: a tuple or a bare tensor, without the tensors."""
    return (None,) * len(output) if isinstance(output, tuple) else None


def first(output: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, value: Tensor) -> Any:
    """An output of the same skeleton with other hidden states, and nothing else in it."""
    return (value, *(None,) * (len(output) - 1)) if isinstance(output, tuple) else value


@contextmanager
def stand_ins(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules at paths below ``root``, and the originals back, whatever happens.

    A path inside another one must come before it: it is replaced first, and put back last.
    """
    originals = {path: root.get_submodule(path) for path in replacements}
    with undone(*(partial(replace_module, root, path, module) for path, module in reversed(originals.items()))):
        for path, module in replacements.items():
            replace_module(root, path, module)
        yield
