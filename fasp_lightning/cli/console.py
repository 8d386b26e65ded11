"""Tables on stdout; progress and notes on stderr."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fasp_lightning.pruning.progress import ProgressEvent

Item = TypeVar("Item")

PLAIN_WIDTH = 120
"""Columns where the output is no terminal: a pipe should not wrap as an 80-column one."""

STEPS = 10
"""Lines of progress where stderr is no terminal."""


def results() -> Console:
    """Console for results."""
    return _console(stderr=False)


def notes() -> Console:
    """Console for everything that is not a result."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    return console


def note(text: str) -> None:
    """A line for the user on stderr."""
    notes().print(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> None:
    """Print a table: the first column to the left, the others to the right if they hold numbers."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    drawn.show_header = any(columns)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index and numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    results().print(drawn)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Show warnings as notes of one line."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


class PruningProgress:
    """Shows the events of :meth:`fasp_lightning.FASPPruner.prune`: block, phase, and time left.

    A bar on a terminal, else a line now and then. Use it as a context manager, and call it with each event.
    """

    def __init__(self) -> None:
        self._bar = _bar("block {task.fields[block]}", "{task.fields[phase]}")
        self._task = self._bar.add_task("prune", total=None, block="", phase="capture")
        self._started = 0.0
        self._step = 0

    def __enter__(self) -> PruningProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Show an event."""
        block = f"{event.block + 1}/{event.blocks}"
        self._bar.update(self._task, completed=event.done, total=event.total, block=block, phase=event.phase)
        if event.done == 1:  # what came before, such as own text, says nothing of the units to come
            self._started = time.perf_counter()
        step = event.done * STEPS // max(event.total, 1)
        if self._bar.disable and step > self._step and event.done > 1:
            self._step = step
            left = (time.perf_counter() - self._started) * (event.total - event.done) / (event.done - 1)
            note(f"pruning: block {block}, {event.phase}, about {duration(left)} left")


def tracked(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Go through items with a progress bar, where stderr is a terminal."""
    with _bar(what) as bar:
        yield from bar.track(items, description=what)


def _bar(*texts: str) -> Progress:
    console = notes()
    return Progress(
        *(TextColumn(text) for text in texts),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # known before it starts: one disabled later never ends its refreshing thread
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def megabytes(size: float) -> str:
    """Bytes as MB (10⁶)."""
    return f"{size / 1e6:,.1f} MB"


def gibibytes(size: float) -> str:
    """Bytes as GiB (2³⁰)."""
    return f"{size / 2**30:,.2f} GiB"


def percent(fraction: float) -> str:
    """A fraction as per cent with two digits."""
    return f"{100 * fraction:.2f} %"


def change(before: float, after: float) -> str:
    """Relative change in per cent with its sign."""
    return f"{100 * (after / before - 1):+.2f} %" if before else "-"


def duration(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
