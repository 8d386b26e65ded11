"""Lightning's loops: what they have done with their batches, and what they leave out in resuming a run.

Tested with lightning 2.6.6; each function says what it relies on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fasp_lightning.pruning.processes import Processes


def unsaved_state(trainer: Trainer, module: LightningModule) -> dict[str, dict[str, Tensor]]:
    """What Lightning leaves out of a checkpoint: pending gradients, and the metrics that callbacks and schedules watch.

    To be called by all processes.
    """
    return {"gradients": _pending_gradients(trainer, module), "metrics": dict(trainer.callback_metrics)}


def take_up(trainer: Trainer, module: LightningModule, unsaved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let a resumed run go on with what a run that was not stopped would do next.

    Args:
        trainer: In ``on_train_start``.
        module: Its LightningModule.
        unsaved: What :func:`unsaved_state` gave when the checkpoint was written.
    """
    trainer.callback_metrics.update(unsaved.get("metrics", {}))
    _mend_progress(trainer)
    gradients = unsaved.get("gradients", {})
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)


def begins_epoch(trainer: Trainer) -> bool:
    """Whether the iterator over training data that Lightning made in resuming is the next epoch's.

    Otherwise it serves what is left of an epoch, and what making it drew from global generators was drawn in vain. To
    be asked in ``on_train_start``, after :func:`take_up` (restart stages of ``fit_loop``).
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    after_last = loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch
    return not fit.restarted_on_epoch_end and (after_last or not fit.restarted_mid_epoch)


def _mend_progress(trainer: Trainer) -> None:
    """Count steps and epochs as the run that was not stopped (restart stages and progress of ``fit_loop``)."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if fit.resumed_on_epoch_end:
        _mend_before_epoch(trainer)
    elif fit.restarted_on_epoch_end:
        _mend_at_epoch_end(trainer)
    elif loop.restarted_on_train_batch_end:
        _mend_after_batch(trainer)
    elif fit.restarted_mid_epoch and loop.restarted_on_last:
        _mend_in_validation(trainer)
    elif fit.restarted_mid_epoch:  # written in the middle of a batch, which comes again
        loop._batches_that_stepped -= not loop._should_accumulate()
    # else schedules that watch a metric would not move at the end of this epoch; its setter reaches the inner loops
    fit._restarting = False


def _mend_after_batch(trainer: Trainer) -> None:
    """Run what was due after the batch: a validation, and the end of the epoch if the batch was its last one.

    Lightning takes both as done: early stopping, checkpoints and learning rate schedules would miss them. Without
    validation the epoch ends as its loader gives no further batch, which one without a length may do.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    closed = fit.restarted_mid_epoch and loop.batch_progress.is_last_batch
    if closed:
        _count_epochs(trainer, processed=-1, completed=-1)
    if _validation_is_due(trainer):
        _validate_anew(trainer)
    elif closed and trainer.num_training_batches < math.inf:
        loop._batches_that_stepped += 1
    else:
        _count_epochs(trainer, processed=int(closed), completed=int(closed))
        return
    loop.batch_progress.increment_completed()
    loop._restart_stage = "restarted_on_last"


def _mend_in_validation(trainer: Trainer) -> None:
    """Begin a validation anew that was cut short, and count the step of one that was run only before a stop."""
    loop = trainer.fit_loop.epoch_loop
    batches = loop.val_loop.batch_progress.current
    if not _validation_is_due(trainer):
        loop._batches_that_stepped += not loop._should_accumulate()
    elif batches.ready == 0 or batches.ready != batches.completed:
        _validate_anew(trainer)


def _validate_anew(trainer: Trainer) -> None:
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop._restart_stage = "restarted_mid_evaluation"
    loop.restarting = False  # from its first batch


def _mend_at_epoch_end(trainer: Trainer) -> None:
    """Undo beforehand what Lightning will count twice under ``max_steps``, passing the end of the epoch again."""
    _count_epochs(trainer, processed=-1)
    if _validation_is_due(trainer):
        trainer.fit_loop.epoch_loop._batches_that_stepped -= 1


def _mend_before_epoch(trainer: Trainer) -> None:
    """Do what comes between the end of an epoch and the next, or go on with the epoch if a stop had cut it short.

    Under ``max_epochs`` Lightning takes it for a whole one. A loader that cannot resume has to begin the next.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    _count_epochs(trainer, processed=-1, completed=-1)
    cut_short = not loop.batch_progress.is_last_batch and not loop._num_ready_batches_reached()
    if cut_short and _loader_resumes(trainer):
        fit.restarting = True
        fit.update_restart_stage()
        loop.val_loop.restarting = False
        loop._batches_that_stepped -= _validation_is_due(trainer)
        return
    if not cut_short:
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    _count_epochs(trainer, processed=1, completed=1)


def _loader_resumes(trainer: Trainer) -> bool:
    combined = trainer.fit_loop._combined_loader
    return combined is not None and all(hasattr(loader, "load_state_dict") for loader in combined.flattened)


def _count_epochs(trainer: Trainer, processed: int, completed: int = 0) -> None:
    progress: Any = trainer.fit_loop.epoch_progress
    for tracker in (progress.total, progress.current):
        tracker.processed += processed
        tracker.completed += completed


def _validation_is_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _pending_gradients(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Gradients of the batches since the last optimizer step, by parameter; their mean over all processes.

    Empty outside a window of accumulated batches (``epoch_loop.batch_progress``).
    """
    loop: Any = trainer.fit_loop.epoch_loop
    batches, last = loop.batch_progress.current, loop._num_ready_batches_reached()
    if batches.processed % trainer.accumulate_grad_batches == 0 or (last and batches.processed == batches.ready):
        return {}
    processes = Processes.everyone()
    gradients = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    for gradient in gradients.values():
        processes.add(gradient)
        gradient /= processes.count
    return gradients


class BatchProgress:
    """Reads the batch counters of a trainer's fit loop; ``fit_loop.epoch_loop.batch_progress``.

    Args:
        trainer: Gives the trainer, or None while there is none.
    """

    def __init__(self, trainer: Callable[[], Trainer | None] = lambda: None) -> None:
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
