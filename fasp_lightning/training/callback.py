"""FASP as a Lightning callback: it decides what happens when, and leaves the work to other modules."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.widths import is_reached
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.training import reporting
from fasp_lightning.training.calibration import Draw, calibration_loader
from fasp_lightning.training.distilling.distiller import Distiller, checked_distiller, load_teacher, save_teacher
from fasp_lightning.training.distilling.teacher import Teacher
from fasp_lightning.training.events import Quality, check_data, prune_model, validation_quality
from fasp_lightning.training.modeling.export import data_tokenizer, export_model
from fasp_lightning.training.modeling.locate import find_causal_lm
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora
from fasp_lightning.training.modeling.structure_state import carries_structure, carry_structure
from fasp_lightning.training.recovery import Recovery, trained_names
from fasp_lightning.training.reporting import EventRecord
from fasp_lightning.training.schedule import PruningSchedule, ScheduledPruning
from fasp_lightning.training.sharding.checks import check_sharded_model
from fasp_lightning.training.sharding.restoring import restore_structure
from fasp_lightning.training.starting import check_arguments, check_run
from fasp_lightning.training.trainer import checks, resuming, surgery
from fasp_lightning.training.trainer.handover import Handover
from fasp_lightning.training.trainer.random_state import random_states, restore_own

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSAVED = "fasp_unsaved"
"""Entry of a checkpoint that holds what Lightning leaves out: pending gradients and watched metrics."""


class FASPPruning(Callback):
    """Prunes the causal LM of a LightningModule during ``fit``, at the points of a schedule.

    An event runs before the first batch whose optimizer step, or epoch, has come, when no gradient is pending:
    perplexity, calibration, pruning block by block, perplexity. Optimizer state, DDP, averaged weights and compiled
    code follow (state of layers whose value dims an event turns to their principal basis starts anew); learning rate
    schedules go on. ``ModelCheckpoint`` and ``EarlyStopping`` start to compare anew.
    ``fasp/…`` metrics go to every logger at ``trainer.global_step``, and to ``trainer.callback_metrics``. Supported
    are one device, ``ddp``, and FSDP2 (``ModelParallelStrategy``, a block at a time whole); statistics are summed.

    Args:
        schedule: When to prune, and how far: a :class:`~fasp_lightning.PruningSchedule`, its plain data
            (``{kind: cubic, …}`` or a list of ``{step | epoch, sparsity}``), or the path of a YAML file that holds it.
        pruning: How to prune; its ``sparsity`` is replaced by that of each event.
        recovery: What trains after the first event: ``"none"``, what the module trains anyway; ``"full"``, every
            parameter; ``"blocks"``, those of the decoder blocks; ``"lora"``, adapters. It makes no difference before.
        lora: Settings of the adapters for ``recovery="lora"``, where the model has none; they are merged at the end
            of the run.
        attribute: Path of the model in the module, such as ``"model"``; by default the one causal LM that is found.
        calibration_sequences: Sequences of an event, in all processes together, drawn anew for each from
            ``calibration_dataloader()`` of the datamodule or module, else from the training data.
        validation_batches: Batches of each validation loader and process that perplexity is measured on; 0 for none.
        seed: Seed of the drawing of calibration sequences.
        export_to: Folder for the pruned model at the end of the run, adapters merged, with the datamodule's
            ``tokenizer`` if it has one; as :func:`~fasp_lightning.save_pruned` writes it.
        form: How it is written: ``"auto"``, ``"stock"``, ``"compact"`` or ``"zero_filled"``.
        overwrite: Replace a pruned model in ``export_to``.

    Raises:
        FaspError: From ``setup``, ``on_fit_start`` and ``on_train_start`` on: if the model cannot be found, the
            schedule not be reached, or strategy, optimizer or callbacks could not follow.

    Example::

        import lightning as L
        from fasp_lightning import CausalLMModule, FASPPruning, PruningSchedule
        pruning = FASPPruning(PruningSchedule.linear(0.3, every_n_steps=1, rounds=2), recovery="lora")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(callbacks=[pruning], max_steps=2, accelerator="cpu", **quiet).fit(CausalLMModule(name), loader)
        print([(record.step, record.sparsity, record.parameters) for record in pruning.records])
    """

    def __init__(
        self,
        schedule: PruningSchedule | dict[str, Any] | list[dict[str, Any]] | str,
        pruning: PruningConfig | None = None,
        recovery: Literal["none", "full", "blocks", "lora"] = "none",
        lora: LoRAConfig | None = None,
        attribute: str | None = None,
        calibration_sequences: int = 64,
        validation_batches: int = 16,
        seed: int = 0,
        export_to: str | None = None,
        form: Literal["auto", "stock", "compact", "zero_filled"] = "auto",
        overwrite: bool = False,
    ) -> None:
        check_arguments(recovery, calibration_sequences, validation_batches)
        self.schedule = PruningSchedule.parse(schedule)
        self.pruning = pruning or PruningConfig()
        self.recovery = recovery
        self.lora = lora
        self.attribute = attribute
        self.calibration_sequences = calibration_sequences
        self.validation_batches = validation_batches
        self.seed = seed
        self.export_to = export_to
        self.form = form
        self.overwrite = overwrite
        self._records: list[EventRecord] = []
        self._done = 0
        self._injected = self._ended = self._halfway = False
        self._recovery = Recovery(recovery)
        self._random: list[dict[str, Any] | None] | None = None
        self._unsaved: dict[str, dict[str, Tensor]] = {}
        self._processes = Processes()
        self._handover = Handover()
        self._distiller: Distiller | None = None
        self._begin: Callable[[], None] | None = None

    @property
    def records(self) -> list[EventRecord]:
        """What each event did; in the main process of spawned ones too."""
        if not self._records:
            self._records = [EventRecord(**record) for record in self._handover.take()]
        return self._records

    @property
    def teacher(self) -> Teacher | None:
        """What a module with settings as its ``distillation`` learns from; ``None`` before the first event."""
        return self._distiller.teacher if self._distiller else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the model, refuse what cannot work, and let checkpoints carry the plan."""
        model = self._model(pl_module)
        carried = carries_structure(pl_module)
        for module in (pl_module, *surgery.averages(trainer)):
            carry_structure(module, self.attribute)
        restore_structure(trainer, pl_module, self.attribute)
        if stage != "fit":
            return
        self._records, self._done, self._random, self._begin = [], 0, None, None
        self._ended = self._halfway = False
        self._processes = Processes.everyone()
        surgery.rejoin(trainer)
        check_run(trainer, pl_module, model, self, carried)
        self._distiller = checked_distiller(pl_module, model)
        self._set_up_recovery(trainer, model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that could not follow; set which parameters train; restore a resumed run's random state."""
        checks.check_optimizers(trainer, self.schedule)
        check_sharded_model(trainer, self._model(pl_module))
        self._recovery.check(self._model(pl_module), trainer.optimizers)
        self._begin = partial(self._take_up, trainer, pl_module)
        self._begin()

    def _take_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._halfway:
            raise FaspError(
                "ckpt_path must not be written in the middle of a pruning, got one that was, on an error in it; "
                "resume from the checkpoint before"
            )
        with surgery.unwrapped(trainer):
            self._recovery.apply(self._model(pl_module), bool(self._done or self._records), trainer.optimizers)
        restore_own(self._random or ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a schedule that the run will not reach the end of, and data that gives no calibration."""
        checks.check_length(trainer, self.schedule, self._done)
        check_data(trainer, self._model(pl_module), self._draw(trainer, pl_module), self.validation_batches)
        if self._distiller:
            self._distiller.start(trainer, self._model(pl_module), self.validation_batches)
        if self._random is not None:
            resuming.take_up(trainer, pl_module, self._unsaved)
            self._unsaved = {}
            if not resuming.begins_epoch(trainer):
                restore_own(self._random)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the events whose time has come."""
        if not surgery.on_boundary(trainer, batch_idx):
            return
        while event := self.schedule.due(self._done, trainer.global_step, trainer.current_epoch):
            model = self._model(pl_module)
            if is_reached(model, self._config(event)):
                # it was pruned so far before this run, whose checkpoint may have brought the weights alone
                with surgery.unwrapped(trainer):
                    self._recovery.apply(model, True, trainer.optimizers)
            else:
                self._run(trainer, pl_module, event)
            self._done += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what recovery brought."""
        self._ended = True
        reporting.report_missed(self.schedule, self._done)
        if self._records:
            quality = self._quality(trainer, pl_module)
            reporting.report_recovered(trainer, self._records, quality)
            reporting.report_structure(trainer, self._model(pl_module), quality)
            reporting.report_history(trainer, self._records)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the adapters that this callback attached, and export; after the last checkpoint, which has them."""
        if not self._ended:  # resumed after its last step: Lightning trains nothing, and skips on_train_end
            self.on_train_end(trainer, pl_module)
        model = self._model(pl_module)
        if self._injected:
            merge_lora(model)
            self._injected = False
        records = [dataclasses.asdict(record) for record in self._records]
        if checks.starts_by_spawn(trainer) and trainer.is_global_zero:
            self._handover.give(records)
        if self.export_to is not None and trainer.is_global_zero:
            model.fasp_report = getattr(model, "fasp_report", {}) | {"events": records}  # type: ignore[assignment]  # saved along
            export_model(model, self.export_to, data_tokenizer(trainer), self.form, self.overwrite)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out, see :func:`~fasp_lightning.training.trainer.resuming.unsaved_state`."""
        save_teacher(pl_module, checkpoint)
        checkpoint[UNSAVED] = resuming.unsaved_state(trainer, pl_module, self._processes)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what :meth:`on_save_checkpoint` added until the run starts."""
        load_teacher(pl_module, checkpoint)
        self._unsaved = checkpoint.get(UNSAVED, {})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a checkpoint of the error be written without the other processes, which may wait elsewhere for ever."""
        self._processes = Processes()
        surgery.part(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Events done and the random state of each process, as plain data and tensors; called by all processes."""
        records = [dataclasses.asdict(record) for record in self._records]
        state = {"done": self._done, "halfway": self._halfway, "records": records}
        return state | {"random": random_states(self._processes), "schedule": self.schedule.to_list()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; the random state is put back when the run starts."""
        same = state_dict["schedule"] == self.schedule.to_list()
        # of another schedule's events, on_train_batch_start finds those done whose sparsity the model has reached
        self._done = state_dict["done"] if same else 0
        self._halfway = state_dict["halfway"]
        self._records = [EventRecord(**record) for record in state_dict["records"]]
        self._random = state_dict["random"]
        if self._begin:  # a sharded model is loaded after on_fit_start
            self._begin()

    def _run(self, trainer: Trainer, pl_module: LightningModule, event: ScheduledPruning) -> None:
        """Run one event: measure, prune, measure, report."""
        model = self._model(pl_module)
        before = self._quality(trainer, pl_module)
        reporting.report_recovered(trainer, self._records, before)
        reporting.report_structure(trainer, model, before, before=True)
        draw = self._draw(trainer, pl_module)
        if self._distiller:
            self._distiller.before_event(trainer, model)
        start, self._halfway = time.perf_counter(), True
        with surgery.unwrapped(trainer):
            report = prune_model(trainer, model, self._config(event), draw, self.attribute)
            self._recovery.apply(model, True, trainer.optimizers)
        seconds = time.perf_counter() - start
        pruned = self._quality(trainer, pl_module)
        record = reporting.new_record(trainer.global_step, report, seconds, before, pruned)
        self._records.append(record)
        self._halfway = False
        surgery.forget_best(trainer)
        reporting.report_event(trainer, record, report)
        reporting.report_structure(trainer, model, pruned)
        reporting.report_history(trainer, self._records)

    def _quality(self, trainer: Trainer, pl_module: LightningModule) -> Quality:
        return validation_quality(trainer, self._model(pl_module), self.validation_batches, self._distiller)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> Draw:
        loader = calibration_loader(trainer, pl_module)
        return Draw(loader, self.calibration_sequences, self.seed, self._done)

    def _config(self, event: ScheduledPruning) -> PruningConfig:
        return dataclasses.replace(self.pruning, sparsity=event.sparsity)

    def _model(self, pl_module: nn.Module) -> PreTrainedModel:
        return find_causal_lm(pl_module, self.attribute)

    def _set_up_recovery(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Attach adapters where recovery needs them, and let all that will ever train go to the optimizers."""
        if self._injected:  # an earlier fit ended with an error before it merged them
            merge_lora(model)
        own = trained_names(model)
        self._injected = self.recovery == "lora" and not has_adapters(model)
        if self._injected:
            for module in (trainer.lightning_module, *surgery.averages(trainer)):
                attach_lora(self._model(module), self.lora or LoRAConfig())
        self._recovery = Recovery(self.recovery, own)
        self._recovery.prepare(model)
