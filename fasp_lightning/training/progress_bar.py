"""A progress bar of a pruning, shown beside the Trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from fasp_lightning.pruning.progress import Progress, ProgressEvent


@contextmanager
def pruning_bar(trainer: Trainer, description: str) -> Iterator[Progress | None]:
    """Show a progress bar for the time of a pruning.

    Args:
        trainer: Its progress bar decides the kind, and whether there is one in this process.
        description: Text before the bar.

    Yields:
        What :meth:`~fasp_lightning.FASPPruner.prune` takes as ``progress``; ``None`` where the Trainer shows no bar.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with Tqdm(desc=description, position=2 * bar.process_position + 1, leave=False, dynamic_ncols=True) as line:
            yield _to_tqdm(line)
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        task = bar._add_task(1, description)
        try:
            yield _to_rich(bar, bar.progress, task)
        finally:
            bar.progress.remove_task(task)
    else:
        yield None


def _to_tqdm(line: Any) -> Callable[[ProgressEvent], None]:
    def show(event: ProgressEvent) -> None:
        line.total, line.n = event.total, event.done
        line.set_postfix_str(f"block {event.block + 1}/{event.blocks}, {event.phase}", refresh=False)
        line.refresh()

    return show


def _to_rich(bar: RichProgressBar, tasks: Any, task: Any) -> Callable[[ProgressEvent], None]:
    def show(event: ProgressEvent) -> None:
        tasks.update(task, total=event.total, completed=event.done)
        bar.refresh()

    return show
