"""Reading ahead, and writing, beside the computing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fasp_lightning.checkpoints.streaming.files import read_weights

Places = list[tuple[Path, str]]
"""File and stored name of each weight of a part."""


@dataclass
class Traffic:
    """What went between the disk and the memory.

    Attributes:
        read: Bytes.
        read_seconds: Time that reading took, most of it beside the computing.
        written: Bytes.
        written_seconds: Likewise.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0


class Disk:
    """One thread that reads the next part, or writes the last one: so at most two are in memory.

    Attributes:
        traffic: What it has read and written.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fasp-stream")
        self._next: tuple[Places, Future[dict[str, Tensor]]] | None = None
        self._written: Future[None] | None = None

    def read(self, places: Places) -> dict[str, Tensor]:
        """Weights by their stored names; those that were read ahead are at hand."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] is places:
            return ahead[1].result()
        _drop(ahead)
        self.settle()
        return self._read(places)

    def read_beside(self, places: Places) -> dict[str, Tensor]:
        """Weights as :meth:`read` gives them; those that were read ahead stay at hand."""
        return self._read(places)

    def look_ahead(self, places: Places) -> None:
        """Begin to read what :meth:`read` will be asked for next."""
        _drop(self._next)
        self._next = places, self._worker.submit(self._read, places)

    def write(self, write: Callable[[], None], size: int) -> None:
        """Write something; what was to be written before is written by then.

        Args:
            write: Does it.
            size: Bytes.

        Raises:
            OSError: If what was to be written before could not be.
        """
        self.settle()

        def timed() -> None:
            start = time.perf_counter()
            write()
            self.traffic.written += size
            self.traffic.written_seconds += time.perf_counter() - start

        self._written = self._worker.submit(timed)

    def settle(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: If it could not be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Stop, once what is being read and written is."""
        ahead, self._next = self._next, None
        _drop(ahead)
        self._worker.shutdown()

    def _read(self, places: Places) -> dict[str, Tensor]:
        start = time.perf_counter()
        found = read_weights(places)
        self.traffic.read_seconds += time.perf_counter() - start
        self.traffic.read += sum(tensor.nbytes for tensor in found.values())
        return found


def _drop(ahead: tuple[Places, Future[dict[str, Tensor]]] | None) -> None:
    """Forget what was read ahead, or an error of it."""
    if ahead is not None and not ahead[1].cancel():
        ahead[1].exception()
