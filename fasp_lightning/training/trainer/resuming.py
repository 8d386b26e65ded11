"""Lightning's loops: what they have done with their batches, and what they leave out in resuming a run.

Checked against lightning 2.6.6. Comments name the upstream code that makes a repair necessary, relative to
``lightning/pytorch``, and give the state before → after the repair for epochs of 5 training and 3 validation batches.
Counters are written ready/started/processed/completed, as ``loops/progress.py`` counts them; ``epoch`` is
``fit_loop.epoch_progress``, ``batch`` ``epoch_loop.batch_progress.current``, ``stepped``
``epoch_loop._batches_that_stepped`` (the step that loggers write), and a stage is the ``_restart_stage`` of its loop.

All repairs run in ``on_train_start``: after ``_FitLoop.reset``, which has set the restart stages, and before
``_TrainingEpochLoop.reset``, which acts upon them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.ownership import is_spread
from fasp_lightning.training.sharding.shard import reshard
from fasp_lightning.training.sharding.weights import resharded, whole


def unsaved_state(trainer: Trainer, module: LightningModule, processes: Processes) -> dict[str, dict[str, Tensor]]:
    """What Lightning leaves out of a checkpoint: pending gradients, and the metrics that callbacks and schedules watch.

    Args:
        trainer: The Trainer.
        module: Its LightningModule.
        processes: Those that call this together.
    """
    # _CheckpointConnector.dump_checkpoint (trainer/connectors/checkpoint_connector.py) writes weights, optimizers,
    # schedules and counters of loops, but neither .grad nor callback_metrics.
    return {"gradients": _pending_gradients(trainer, module, processes), "metrics": dict(trainer.callback_metrics)}


def take_up(trainer: Trainer, module: LightningModule, unsaved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let a resumed run go on with what a run that was not stopped would do next.

    Args:
        trainer: In ``on_train_start``.
        module: Its LightningModule.
        unsaved: What :func:`unsaved_state` gave when the checkpoint was written.
    """
    # A ReduceLROnPlateau or a ModelCheckpoint that moves before the next validation would miss its metric:
    # callback_metrics {} → {"val_loss": …}.
    trainer.callback_metrics.update(unsaved.get("metrics", {}))
    _mend_progress(trainer)
    # Lightning resumes in the middle of a window of accumulated batches (batch 3/3/3/3 of windows of 2), and would step
    # with the rest of the window alone: grad None → the gradient of batch 3.
    gradients = unsaved.get("gradients", {})
    for name, parameter in module.named_parameters():
        if name in gradients:
            saved = gradients[name]
            parameter.grad = resharded(parameter.detach(), saved.to)


def begins_epoch(trainer: Trainer) -> bool:
    """Whether the iterator over training data that Lightning made in resuming is the next epoch's.

    Otherwise it serves what is left of an epoch, and what making it drew from global generators (a shuffling sampler
    draws its seed) was drawn in vain. To be asked in ``on_train_start``, after :func:`take_up`.
    """
    # _FitLoop.setup_data (loops/fit_loop.py) calls iter() before on_train_start in any case;
    # _TrainingEpochLoop.on_run_start (loops/training_epoch_loop.py) calls it again only in epochs that are not resumed.
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    after_last = loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch
    return not fit.restarted_on_epoch_end and (after_last or not fit.restarted_mid_epoch)


def _mend_progress(trainer: Trainer) -> None:
    """Count steps and epochs as the run that was not stopped, according to where the checkpoint was written."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if fit.resumed_on_epoch_end:
        _mend_before_epoch(trainer)
    elif fit.restarted_on_epoch_end:
        _mend_at_epoch_end(trainer)
    elif loop.restarted_on_train_batch_end:
        _mend_after_batch(trainer)
    elif fit.restarted_mid_epoch and loop.restarted_on_last:
        _mend_in_validation(trainer)
    elif fit.restarted_mid_epoch:
        # Written while batch 4 was fetched and not trained on (batch 4/3/3/3), as ModelCheckpoint.on_exception does.
        # _TrainingEpochLoop.reset puts batch 4 back (3/3/3/3), but counts its step at once, and on_advance_end counts
        # it again when it has run. With windows of 2: stepped 1 → 0, which reset makes 1.
        loop._batches_that_stepped -= not loop._should_accumulate()
    # _FitLoop.on_advance_end moves plateau schedules at the end of an epoch only if not self.restarting, since their
    # metric is in no checkpoint (here it is). _Loop.on_iteration_done (loops/loop.py) lowers the flag too late, after
    # on_advance_end. fit._restarting True → False; the property's setter would lower the flags of the inner loops too,
    # which _TrainingEpochLoop.reset and advance still need.
    fit._restarting = False


def _mend_after_batch(trainer: Trainer) -> None:
    """Run what was due after the batch: a validation, and the end of the epoch if the batch was its last one.

    Lightning takes both as done: early stopping, checkpoints and learning rate schedules would miss them.
    """
    # Written by ModelCheckpoint.on_train_batch_end(every_n_train_steps): batch 5/5/5/4, epoch 1/1/0/0, stepped 4.
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    closed = fit.restarted_mid_epoch and loop.batch_progress.is_last_batch
    if closed:
        # _FitLoop.reset has closed the epoch without on_train_epoch_end: epoch 1/1/1/1 → 1/1/0/0. It must be so before
        # the next question, since _should_check_val_epoch counts by trainer.current_epoch = completed.
        _count_epochs(trainer, processed=-1, completed=-1)
    if _validation_is_due(trainer):
        # _TrainingEpochLoop.advance skips a validation that is due in the first iteration of a resumed run, unless the
        # stages say that one was cut short; then on_advance_end runs it and counts the step. The same in the middle of
        # an epoch: batch 2/2/2/1 → 2/2/2/2.
        _validate_anew(trainer)
    elif closed and trainer.num_training_batches < math.inf:
        # advance asks the loader for one more batch; one that resumes has none (see BatchProgress.over). That
        # StopIteration lets _FitLoop.on_advance_end close the epoch with its hooks, but on_advance_end of the inner
        # loop, which would count the step, is not reached: stepped 4 → 5.
        loop._batches_that_stepped += 1
    else:
        # Nothing is due, or the loader has no length, and whether it has a further batch is not known: both stay as
        # Lightning has them, epoch 1/1/0/0 → 1/1/1/1 where it was reopened above.
        _count_epochs(trainer, processed=int(closed), completed=int(closed))
        return
    # Else _TrainingEpochLoop.reset would complete the batch, see 5 of 5 completed, and reset the counters for a next
    # epoch: batch 5/5/5/4 → 5/5/5/5, stage restarted_on_train_batch_end → restarted_on_last.
    loop.batch_progress.increment_completed()
    loop._restart_stage = "restarted_on_last"


def _mend_in_validation(trainer: Trainer) -> None:
    """Begin a validation anew that was cut short, and count the step of one that was run only before a stop."""
    # Written with the batch completed and the epoch not: batch 5/5/5/5, epoch 1/1/0/0, stepped 4.
    loop = trainer.fit_loop.epoch_loop
    batches = loop.val_loop.batch_progress.current
    if not _validation_is_due(trainer):
        # Written in a validation that _TrainingEpochLoop._should_check_val_fx allowed since trainer.should_stop was
        # set (batch 4/4/4/4). The resumed run goes straight to the next batch, without on_advance_end of this one,
        # which counts its step: stepped 1 → 2 with windows of 2.
        loop._batches_that_stepped += not loop._should_accumulate()
    elif batches.ready == 0 or batches.ready != batches.completed:
        # _EvaluationLoop.update_restart_stage (loops/evaluation_loop.py) knows a validation that stopped within a batch
        # (2/2/1/1), not one that stopped before its first batch (0/0/0/0) or between two (2/1/1/1): its stage is none,
        # and _TrainingEpochLoop.advance skips it. After its end (3/3/3/3, as ModelCheckpoint.on_validation_end writes)
        # that is right.
        _validate_anew(trainer)


def _validate_anew(trainer: Trainer) -> None:
    """Let the validation that is due run, from its first batch."""
    # Stage none → restarted_mid_evaluation, so that _TrainingEpochLoop.advance returns to it; restarting True → False,
    # so that _EvaluationLoop.reset starts to count at 0. Otherwise it would go on from 2/1/1/1 as 1/1/1/1, though its
    # iterator begins with the first batch: one batch would be taken for the last too early.
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop._restart_stage = "restarted_mid_evaluation"
    loop.restarting = False


def _mend_at_epoch_end(trainer: Trainer) -> None:
    """Undo beforehand what Lightning will count twice under ``max_steps``, passing the end of the epoch again."""
    # Written by ModelCheckpoint.on_train_epoch_end: epoch 1/1/1/0, batch 5/5/5/5, stepped 5. Under max_steps
    # _FitLoop.restarting stays true, and _FitLoop.on_advance_end runs once more for this epoch, with its hooks, and
    # counts it: epoch processed 1 → 0, which becomes 1 again. Before that, _TrainingEpochLoop.advance skips the
    # validation of the last batch, and on_advance_end counts its step again: stepped 5 → 4. Where no validation is due,
    # advance asks the loader for one more batch; one that resumes has none, and the step is not counted again.
    _count_epochs(trainer, processed=-1)
    if _validation_is_due(trainer):
        trainer.fit_loop.epoch_loop._batches_that_stepped -= 1


def _mend_before_epoch(trainer: Trainer) -> None:
    """Do what comes between the end of an epoch and the next, or go on with the epoch if a stop had cut it short.

    Under ``max_epochs`` Lightning takes it for a whole one. A loader that cannot resume has to begin the next.
    """
    # Written by ModelCheckpoint.on_train_epoch_end: epoch 1/1/1/0; _FitLoop.reset has made it 1/1/1/1. While the old
    # epoch is asked about, it must be open: 1/1/1/1 → 1/1/0/0.
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    _count_epochs(trainer, processed=-1, completed=-1)
    cut_short = not loop.batch_progress.is_last_batch and not loop._num_ready_batches_reached()
    if cut_short and _loader_resumes(trainer):
        # trainer.should_stop ended the epoch at batch 2/2/2/2, and _FitLoop.on_advance_end counted it like any other.
        # With the epoch open, _FitLoop.restarting may be raised: restarting False → True in all loops, stage
        # resumed_on_epoch_end → restarted_mid_epoch, of the inner loop none → restarted_on_last.
        fit.restarting = True
        fit.update_restart_stage()
        loop.val_loop.restarting = False
        # Where a validation is due after this batch, _TrainingEpochLoop.advance skips it and on_advance_end counts the
        # step again, as in _mend_at_epoch_end.
        loop._batches_that_stepped -= _validation_is_due(trainer)
        return
    if not cut_short:
        # _FitLoop.on_advance_end moves plateau schedules after on_train_epoch_end, in which the checkpoint was written:
        # this move is in no checkpoint, and a resumed run does not come by again.
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


def _pending_gradients(trainer: Trainer, module: LightningModule, processes: Processes) -> dict[str, Tensor]:
    """Gradients of the batches since the last optimizer step, by parameter; their mean over the processes.

    Empty outside a window of accumulated batches; of a module that optimizes by itself, and whose windows nobody else
    knows, those that are there.
    """
    # _TrainingEpochLoop._should_accumulate asks of the batch that is fetched; here it is asked of those processed. The
    # last batch of an epoch ends its window.
    loop: Any = trainer.fit_loop.epoch_loop
    batches, last = loop.batch_progress.current, loop._num_ready_batches_reached()
    ended = batches.processed % trainer.accumulate_grad_batches == 0 or (last and batches.processed == batches.ready)
    if ended and module.automatic_optimization:
        return {}
    reshard(module)
    found = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    if any(map(is_spread, found.values())):  # FSDP2 has reduced them to their mean in each backward
        return {name: whole(gradient) for name, gradient in found.items()}
    gradients = {name: gradient.clone() for name, gradient in found.items()}
    for gradient in gradients.values():
        # DDP reduces only in a window's last backward (ParallelStrategy.block_backward_sync, strategies/parallel.py):
        # until then each process has a gradient of its own. All resume from the mean, whose mean is the same.
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

        Resumed from the end of an epoch, with ``max_steps`` and without validation, Lightning fetches one batch more
        before it begins the next epoch, and trains on it alone.
        """
        # _TrainingEpochLoop.done asks val_loop._has_run in a resumed run, finds that it has not, and calls advance
        # with batch 5/5/5/5 of 5, which asks the loader for a sixth.
        trainer = self._trainer()
        if trainer is None:
            return False
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
