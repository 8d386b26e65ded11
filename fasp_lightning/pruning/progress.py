"""How far a pruning is, how long it took and what memory it needed."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fasp_lightning.ops.devices import device_function, synchronize


@dataclass(frozen=True)
class ProgressEvent:
    """Where a pruning is.

    Attributes:
        block: Index of the block, from 0.
        blocks: Number of blocks.
        phase: ``"influence"``, ``"sensitivity"``, ``"learning"``, ``"statistics"`` or ``"apply"``.
        done: Passes of one calibration sample through one block that are done.
        total: Likewise in all.
    """

    block: int
    blocks: int
    phase: str
    done: int
    total: int


Progress = Callable[[ProgressEvent], None]


class WorkCounter:
    """Counts passes of one calibration sample through one block, and calls the progress callback after each.

    Args:
        progress: The callback; ``None`` counts only.
        blocks: Number of blocks.

    Attributes:
        passes: How often this round will go over its whole calibration set.
        later_rounds: Rounds after the present one, each taken to be as long.
    """

    def __init__(self, progress: Progress | None, blocks: int) -> None:
        self._progress = progress
        self._blocks = blocks
        self._done = self._total = 0
        self.passes = 0
        self.later_rounds = 0

    def expect(self, passes: int) -> None:
        """Set how many passes are still to be done in this round, as far as is known now."""
        self._total = self._done + passes * (1 + self.later_rounds)

    def count(self, block: int, phase: str) -> None:
        """Count one pass as done.

        Args:
            block: Index of the block.
            phase: As in :class:`ProgressEvent`.
        """
        self._done += 1
        if self._progress is not None:
            self._progress(ProgressEvent(block, self._blocks, phase, self._done, self._total))


class Stopwatch:
    """Wall-clock seconds by phase. Phases nest: an inner phase's time is taken off the outer one's.

    Args:
        device: Work queued on an accelerator is waited for, so that it counts where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of this block of code as ``name``."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest resident set of the process so far, and of an accelerator since its last reset, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if measure := device_function(device, "max_memory_allocated"):
        peak[device.type] = measure(device)
    return peak
