"""How far a pruning is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """Where a pruning is.

    Attributes:
        block: Index of the block, from 0.
        blocks: Number of blocks.
        phase: ``"sensitivity"``, ``"statistics"`` or ``"apply"``.
        done: Units of work done.
        total: Units of work in all: calibration pieces times passes over them.
    """

    block: int
    blocks: int
    phase: str
    done: int
    total: int


Progress = Callable[[ProgressEvent], None]


class Meter:
    """Counts units of work, and tells.

    Args:
        progress: Called after each unit; ``None`` for nobody.
        blocks: Number of blocks.

    Attributes:
        rounds_left: Rounds after the present one, each taken to be as long.
    """

    def __init__(self, progress: Progress | None, blocks: int) -> None:
        self._progress = progress
        self._blocks = blocks
        self._done = self._total = 0
        self.rounds_left = 0

    def expect(self, units: int) -> None:
        """So many units are still to be done in this round, as far as is known now."""
        self._total = self._done + units * (1 + self.rounds_left)

    def tick(self, block: int, phase: str) -> None:
        """One unit of work is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(ProgressEvent(block, self._blocks, phase, self._done, self._total))
