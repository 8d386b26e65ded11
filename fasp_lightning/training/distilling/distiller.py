"""Gives a run its teacher: checked at setup, read when it is needed, and the same again where a run is resumed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from fasp_lightning.checkpoints.devices import choose_device, choose_dtype
from fasp_lightning.checkpoints.loading import load_config, load_model
from fasp_lightning.errors import FaspError
from fasp_lightning.structure.plan import plan_in, plan_of
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.dense import holds_same_weights, written_beside
from fasp_lightning.training.distilling.store import Sequences
from fasp_lightning.training.distilling.stored import (
    as_stored,
    cache_of,
    stored,
    training_sequences,
    validation_sequences,
)
from fasp_lightning.training.distilling.teacher import Identity, LiveTeacher, Teacher
from fasp_lightning.training.modeling.copying import plain_copy
from fasp_lightning.training.trainer.random_state import isolated_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTE = "fasp_teacher"
"""Entry of a checkpoint: where its teacher comes from, and its fingerprint."""

_MARK = "fasp_distiller"


class Distiller:
    """Holds the teacher of a LightningModule, outside of its module tree.

    So no checkpoint, optimizer, average or DDP bucket has its weights. Deep copies of the module share it.

    Args:
        config: Settings.
        hub: ``revision`` and ``trust_remote_code``, with which the student was read.

    Attributes:
        teacher: Answers to training batches; ``None`` before the first event.
        examiner: The same model, answering to validation batches; ``None`` where it was not asked about them.
    """

    def __init__(self, config: DistillationConfig, hub: dict[str, Any]) -> None:
        self.config = config
        self.teacher: Teacher | None = None
        self.examiner: Teacher | None = None
        self._expected: Identity | None = None
        self._sequences: Sequences | None = None
        self._examined: Sequences | None = None
        self._hub = hub

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        return self

    def __getstate__(self) -> dict[str, Any]:
        read = ("teacher", "examiner", "_sequences", "_examined")  # each spawned process reads them
        return vars(self) | dict.fromkeys(read)

    def expect(self, identity: Identity | None) -> None:
        """Take no other teacher than that of the checkpoint from which a run goes on; to be called after the check."""
        self._expected = identity

    def check(self, model: PreTrainedModel) -> None:
        """Refuse, before anything is read, a teacher that could not be used.

        Args:
            model: The student, its checkpoint not loaded yet.

        Raises:
            FaspError: If its vocabulary is another one, it is not there, or a model that was pruned before does not say
                which one it was pruned from.
        """
        self._expected = self._sequences = self._examined = None
        size = _vocabulary(model.config)
        if self.config.teacher_device is not None:
            choose_device(self.config.teacher_device)
        if self.config.top_k is not None and self.config.top_k >= size:
            raise FaspError(f"top_k must be less than the student's vocabulary of {size}, got {self.config.top_k}")
        if self.config.teacher is None and not _is_pruned(model):
            return
        source = self._source(model)
        found = _vocabulary(load_config(source, **self._options(model, source)))
        if found != size:
            raise FaspError(
                f"teacher must have the student's vocabulary of {size} tokens, got {source!r} with {found}; name a "
                "model with the same tokenizer, or leave teacher out for the model as it was before its pruning"
            )

    def start(self, trainer: Trainer, model: PreTrainedModel, validation_batches: int = 0) -> None:
        """Read the teacher of a model that is pruned already, as one that is resumed is; once it is there, do nothing.

        Args:
            trainer: In ``on_train_start``.
            model: The student, its checkpoint loaded.
            validation_batches: Batches of each validation loader and process that events measure the divergence on.

        Raises:
            FaspError: If it is not the one that the checkpoint names, or cannot be asked about the training data
                beforehand, as ``top_k`` has it.
        """
        if self.config.top_k is not None and self._sequences is None:
            self._sequences = training_sequences(trainer)
            self._examined = validation_sequences(trainer, validation_batches)
        if not _is_pruned(model):
            self.teacher = self.examiner = None  # of an earlier fit
        elif self.teacher is None:
            self._take(trainer, model, lambda: self._named(model))

    def before_event(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Let the model as it is before its first pruning be the teacher, if no other one is named.

        What is asked of it beforehand, it says itself: there is no second model in memory.

        Args:
            trainer: Beside whose checkpoints the model is written, if it is not what its source holds.
            model: The student.
        """
        if self.teacher is not None:
            return
        if self.config.teacher is not None:
            self._take(trainer, model, lambda: self._named(model))
        elif self.config.top_k is not None:
            self._take(trainer, model, lambda: self._copied(model))
        else:
            self._take(trainer, model, lambda: self._itself(trainer, model))

    def _take(self, trainer: Trainer, model: PreTrainedModel, ask: Callable[[], LiveTeacher]) -> None:
        """Have the teacher asked live, or once about all training sequences, and those of validation."""
        if self._sequences is None:
            self.teacher = self.examiner = ask()
            return
        ask, known, place = functools.cache(ask), self._expected, cache_of(trainer)
        if known is not None and self.config.teacher in (None, known.source):
            # a run that goes on need not read what has said all, and does not for other validation data
            self.teacher = stored(known, ask, self._sequences, self.config, place, model)
            examined = self._examined
            self.examiner = None if examined is None else as_stored(known, examined, self.config, place, model)
            return
        self.teacher, self.examiner = (
            None if one is None else stored(ask().identity, ask, one, self.config, place, model)
            for one in (self._sequences, self._examined)
        )

    def _named(self, model: PreTrainedModel) -> LiveTeacher:
        """The one in the settings, in the checkpoint, or in the report of a model that was pruned before."""
        source = self._source(model)
        return self._live(self._read(model, source), source)

    def _copied(self, model: PreTrainedModel) -> LiveTeacher:
        """The model, in the dtype in which :meth:`_read` would read it again."""
        stored = getattr(model, "fasp_stored_dtype", None) or model.dtype
        dtype = choose_dtype(self.config.teacher_dtype, stored, torch.device("cpu"))
        return self._live(plain_copy(model, dtype=dtype), getattr(model, "fasp_source", None))

    def _itself(self, trainer: Trainer, model: PreTrainedModel) -> LiveTeacher:
        """The model, as its source holds it if it was not trained since."""
        source = getattr(model, "fasp_source", None)
        read = None if source is None else self._read(model, source)
        if read is None or not holds_same_weights(read, model):
            with written_beside(trainer, model) as (folder, lasting):
                read, source = self._read(model, str(folder)), str(folder) if lasting else None
        return self._live(read, source)

    def _live(self, model: PreTrainedModel, source: str | None) -> LiveTeacher:
        teacher, expected = LiveTeacher(model, source, self.config), self._expected
        if expected is not None and expected.fingerprint != teacher.identity.fingerprint:
            raise FaspError(
                f"teacher must be that of the run that is resumed, {expected.source!r} with fingerprint "
                f"{expected.fingerprint}, got {source!r} with {teacher.identity.fingerprint}; name that one, or begin "
                "a new run with the weights (load_from_checkpoint)"
            )
        return teacher

    def _source(self, model: PreTrainedModel) -> str:
        """Where the teacher of a model that is pruned already can be read."""
        if self.config.teacher is not None:
            return self.config.teacher
        source = _dense_source(model, self._hub) if self._expected is None else self._expected.source
        if source is None:
            raise FaspError(
                "teacher must be named for a model that is pruned already and whose model before that is not known, "
                "got None; set it in distillation to a folder, hub id or file of that one"
            )
        return source

    def _read(self, model: PreTrainedModel, source: str) -> PreTrainedModel:
        place = self.config.teacher_device or model.device
        with isolated_random_state():
            read: Any = load_model(source, self.config.teacher_dtype, place, **self._options(model, source))
        return read

    def _options(self, model: PreTrainedModel, source: str) -> dict[str, Any]:
        """A revision is that of the student's own repository."""
        return self._hub if source == getattr(model, "fasp_source", None) else self._hub | {"revision": None}


def distiller_of(module: nn.Module) -> Distiller | None:
    """The distiller of a LightningModule with settings of distillation as its ``distillation``; ``None`` of others."""
    config = getattr(module, "distillation", None)
    if not isinstance(config, DistillationConfig):
        return None
    if _MARK not in vars(module):
        given = module.hparams if isinstance(module, LightningModule) else {}
        hub = {"revision": given.get("revision"), "trust_remote_code": given.get("trust_remote_code", False)}
        setattr(module, _MARK, Distiller(config, hub))
    found: Distiller = getattr(module, _MARK)
    return found


def checked_distiller(module: nn.Module, model: PreTrainedModel) -> Distiller | None:
    """The same in ``setup`` of a fit: refused if its teacher could not be used.

    Args:
        module: The LightningModule.
        model: The student in it.

    Raises:
        FaspError: As :meth:`Distiller.check`.
    """
    if distiller := distiller_of(module):
        distiller.check(model)
    return distiller


def save_teacher(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint which teacher the run has; its weights are in none."""
    distiller = distiller_of(module)
    if distiller and distiller.teacher:
        checkpoint[NOTE] = distiller.teacher.identity._asdict()


def load_teacher(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Let a run that goes on with a checkpoint expect the same teacher."""
    if distiller := distiller_of(module):
        distiller.expect(Identity(**checkpoint[NOTE]) if NOTE in checkpoint else None)


def _dense_source(model: PreTrainedModel, hub: dict[str, Any]) -> str | None:
    """Where a model came from, or, if that was pruned, what its report says that it was pruned from."""
    source = getattr(model, "fasp_source", None)
    if source is not None and plan_in(load_config(source, **hub)) is None:
        return str(source)
    base = getattr(model, "fasp_report", {}).get("base", {})
    return base.get("id")


def _is_pruned(model: PreTrainedModel) -> bool:
    plan = plan_of(model)
    return plan is not None and any(plan.blocks)


def _vocabulary(config: Any) -> int:
    size: int = config.get_text_config().vocab_size
    return size
