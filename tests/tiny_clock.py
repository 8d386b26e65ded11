"""A clock for speed-ups that counts operations, so that every figure is exact and the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from fasp_lightning.structure.resolve import is_linear


class Operations:
    """Goes on by the operations of linear and embedding layers, and a little with every other module."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        return self.now

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        matrix = is_linear(module) and isinstance(output, torch.Tensor)
        self.now += module.weight.numel() * (output.numel() // output.shape[-1]) if matrix else 7


@contextmanager
def counting() -> Iterator[Operations]:
    """The clock runs while inside."""
    clock = Operations()
    handle = register_module_forward_hook(clock)
    yield clock
    handle.remove()
