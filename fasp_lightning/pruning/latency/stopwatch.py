"""Times of forward passes, and of single blocks inside them."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasp_lightning.ops.devices import synchronize
from fasp_lightning.pruning.latency.serving import Serving
from fasp_lightning.structure.modes import hooked

SECONDS, LEAST, MOST = 3.0, 4, 100
"""Passes are repeated for about so long, at least and at most so often."""

RUN = 9
"""Decode steps in a row, in the middle of those that are asked for. The first one finds another model's weights in the
caches, and is not counted: a model that is served finds its own."""


class Clock(Protocol):
    """Marks points of the work on a device."""

    def mark(self) -> Any:
        """Mark this point."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to a later one."""


class WallClock:
    """The time on the device: on an accelerator of its own stream, so that nothing waits for a mark.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        accelerator = torch.accelerator.current_accelerator()
        self._events = accelerator is not None and accelerator.type == device.type

    def mark(self) -> Any:
        """Mark this point."""
        if not self._events:
            return time.perf_counter()
        event = torch.Event(self._device.type, enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to a later one."""
        if not self._events:
            return float(end - start)
        synchronize(self._device)
        return float(start.elapsed_time(end)) / 1e3


class Passes:
    """Forward passes of one model, with a cache and the logits of the last token alone, as in ``generate``.

    Args:
        model: A causal LM in evaluation mode.
        serving: Lengths and batch.
        clock: What times them.
        blocks: Blocks to time one by one within each pass.
    """

    def __init__(self, model: Any, serving: Serving, clock: Clock, blocks: Sequence[nn.Module] = ()) -> None:
        self._model, self._serving, self._clock, self._blocks = model, serving, clock, blocks
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1
        self._device = model.get_input_embeddings().weight.device
        self._steps = min(serving.new, RUN)
        self._context = serving.prompt + (serving.new - self._steps) // 2
        self._read: Any = None

    def prefill(self) -> list[list[float]]:
        """Seconds of one pass over the prompt: of each block, and of all beside them."""
        return [self._timed(self._tokens(self._serving.prompt))]

    def decode(self) -> list[list[float]]:
        """The same of several passes over one token more each, after a context that is read once."""
        if self._read is None:
            self._read = self._model(self._tokens(self._context), **self._options).past_key_values
        cache = copy.deepcopy(self._read)
        steps = [self._timed(self._tokens(1), past_key_values=cache) for _ in range(self._steps)]
        return steps[1:] or steps

    def _tokens(self, length: int) -> Tensor:
        return torch.full((self._serving.batch, length), 5, device=self._device)

    def _timed(self, ids: Tensor, **given: Any) -> list[float]:
        marks: list[Any] = []

        def mark(*_: Any) -> None:
            marks.append(self._clock.mark())

        with hooked([(block, mark) for block in self._blocks], [(block, mark) for block in self._blocks]):
            mark()
            self._model(ids, **given, **self._options)
            mark()
        total = self._clock.seconds(marks[0], marks[-1])
        inside = [self._clock.seconds(*pair) for pair in zip(marks[1:-1:2], marks[2:-1:2], strict=True)]
        return [*inside, total - sum(inside)]


def repeated(runs: Sequence[Callable[[], list[list[float]]]]) -> list[list[float]]:
    """Call several runs in turn for a while; the first pass of each is to warm up.

    Args:
        runs: Each gives the parts of one or more passes.

    Returns:
        For each run the median of each part.
    """
    found: list[list[list[float]]] = [[] for _ in runs]
    spent = 0.0
    while len(found[0]) < LEAST or (spent < SECONDS * len(runs) and len(found[0]) < MOST):
        for passes, run in zip(found, runs, strict=True):
            new = run()
            passes += new
            spent += sum(map(sum, new))
    return [[median(part) for part in zip(*passes[1:], strict=True)] for passes in found]
