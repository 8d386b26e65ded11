"""What Lightning has done with the training batches it was given: its counters, read in one place."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L


class BatchProgress:
    """Reads the batch counters of a trainer's fit loop; written against Lightning 2.6.

    Args:
        trainer: Gives the trainer, or None while there is none.
    """

    def __init__(self, trainer: Callable[[], L.Trainer | None] = lambda: None) -> None:
        self._trainer = trainer

    @property
    def in_flight(self) -> int:
        """Batches (0 or 1) that were fetched and not trained on yet."""
        trainer = self._trainer()
        if trainer is None:
            return 0
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        return current.ready - current.processed  # type: ignore[attr-defined]  # a _ProcessedTracker

    @property
    def over(self) -> bool:
        """Whether the epoch has had all its batches.

        Resumed from the end of an epoch, with `max_steps` and without validation, Lightning fetches one batch more
        before it begins the next epoch, and trains on it alone.
        """
        trainer = self._trainer()
        if trainer is None:
            return False
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
