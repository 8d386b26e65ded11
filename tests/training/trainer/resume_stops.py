"""Where a run of the resume law ends: the points, and the callbacks that reach them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from fasp_lightning.pruning.progress import WorkCounter

BATCHES = 5
"""Of an epoch: an odd number, so that the last window of two accumulated batches is a short one."""

EPOCHS = 3


@dataclass(frozen=True)
class Stop:
    """Where a run ends early.

    Attributes:
        point: "batch" (before the events), "pruned" (after them), "calibration", "step" (before its checkpoint),
            "saved" (after it), "validation" (before a batch), "validated", "epoch" or "end".
        count: The how many-th time that it is reached.
        how: "error" raises, "kill" ends the process, "early" lets Lightning stop.
    """

    point: str
    count: int
    how: str = "error"


class StoppedError(RuntimeError):
    """The stop, in the process itself."""


class Stopper:
    """Ends the run at its point."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self.seen = 0

    def reach(self, point: str, trainer: L.Trainer | None = None) -> None:
        if self.stop is None or point != self.stop.point or (trainer is not None and trainer.sanity_checking):
            return
        self.seen += 1
        if self.seen != self.stop.count:
            return
        if self.stop.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stop.how == "error":
            raise StoppedError(f"{point} {self.seen}")
        assert trainer is not None
        trainer.should_stop = True


class Before(L.Callback):
    """Stands before the pruning."""

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper
        self.final: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("batch", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("step", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("validation", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("validated", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("epoch", trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("end", trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adapters are not merged yet."""
        self.final = {
            "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }


class After(L.Callback):
    """Stands behind the pruning."""

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.stopper.reach("pruned", trainer)


WHEN: dict[str, dict[str, Any]] = {
    "step": {"every_n_train_steps": 1},
    "epoch": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
    "error": {"every_n_epochs": EPOCHS + 1, "save_on_exception": True},
}


class Checkpoints(ModelCheckpoint):
    """Keeps every checkpoint."""

    def __init__(self, stopper: Stopper, folder: Path, saves: str) -> None:
        super().__init__(folder, save_top_k=-1, **WHEN[saves])
        self.stopper = stopper

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        self.stopper.reach("saved", trainer)


@contextmanager
def watched_calibration(stopper: Stopper) -> Iterator[None]:
    """Let each unit of the pruner's work be a point to stop at."""
    count = WorkCounter.count

    def watched(self: Any, *place: Any) -> None:
        count(self, *place)
        stopper.reach("calibration")

    WorkCounter.count = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        WorkCounter.count = count  # type: ignore[method-assign]
