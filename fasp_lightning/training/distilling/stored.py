"""A teacher that is asked once about all training sequences, and then read from disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.distillation import TopK
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.staging import fingerprint, require_space
from fasp_lightning.text.batches import TokenBatch, read_batch
from fasp_lightning.text.packed_cache import default_cache
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.store import FORMAT, AnswerStore, Sequences
from fasp_lightning.training.distilling.teacher import Identity, Teacher
from fasp_lightning.training.trainer.random_state import isolated_random_state
from fasp_lightning.training.trainer.surgery import training_loaders, validation_loaders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 1024
"""Tokens that the teacher is asked about at a time."""

LIVE = "set top_k of distillation to null to ask the teacher live"
"""The way out of what cannot be computed beforehand."""

log = logging.getLogger(__name__)


class StoredTeacher:
    """Says what a model once said of the sequences of a run; a :class:`~.teacher.Teacher`.

    Args:
        identity: Which model that was.
        sequences: Those that it was asked about.
        store: What it said.
    """

    def __init__(self, identity: Identity, sequences: Sequences, store: AnswerStore) -> None:
        self.identity = identity
        self._sequences, self._store = sequences, store

    def knows(self, batch: TokenBatch) -> bool:
        """Whether its sequences are among those that it was asked about, whole and as they were."""
        return _is_plain(batch) and self._sequences.hold(batch.input_ids)

    def __call__(self, batch: TokenBatch) -> TopK:
        """See ``Teacher.__call__``."""
        places = self._sequences.places(_ids(batch))
        return TopK(*(part.to(batch.input_ids.device) for part in self._store.read(places)))


def stored(
    identity: Identity,
    ask: Callable[[], Teacher],
    sequences: Sequences,
    config: DistillationConfig,
    place: Path,
    student: PreTrainedModel,
) -> StoredTeacher:
    """The teacher whose answers are on disk; those that are not yet are computed, by all processes together.

    What was stopped goes on with the next file.

    Args:
        identity: Which model it is.
        ask: Gives it live; called only where answers are missing.
        sequences: What it is asked about.
        config: ``top_k`` and ``temperature`` are read.
        place: The cache.
        student: Who will learn from it: the teacher computes where that does, unless settings name another device.

    Raises:
        FaspError: If the disk has no room, or other processes do not see what this one wrote.
        OSError: If it cannot be written.
    """
    processes, store = Processes.everyone(), _store(identity, sequences, config, place, student)
    missing = processes.from_first(store.missing())
    if missing:
        with processes.together():
            mine = missing[processes.rank :: processes.count]
            _compute(store, mine, ask(), sequences.ids, student.device, processes.is_first)
    with processes.together():
        if store.missing():
            raise FaspError(
                f"cache_dir must be a folder that all processes share, got {str(place)!r}, where what others have "
                f"written is not seen; name such a folder, or {LIVE}"
            )
    return StoredTeacher(identity, sequences, store)


def as_stored(
    identity: Identity, sequences: Sequences, config: DistillationConfig, place: Path, student: PreTrainedModel
) -> StoredTeacher | None:
    """The same where all answers are on disk already, else ``None``."""
    store = _store(identity, sequences, config, place, student)
    whole = Processes.everyone().from_first(not store.missing())
    return StoredTeacher(identity, sequences, store) if whole else None


def _store(
    identity: Identity, sequences: Sequences, config: DistillationConfig, place: Path, student: PreTrainedModel
) -> AnswerStore:
    """Under a key of all that decides on the answers."""
    k, (count, seq_len) = config.top_k or 0, sequences.ids.shape
    key = fingerprint(FORMAT, identity.fingerprint, sequences.digest, k, config.temperature)
    return AnswerStore(place / "teacher" / key, count, seq_len, k, ModelInputs(student).vocabulary)


def training_sequences(trainer: Trainer) -> Sequences:
    """All sequences of the training data, in the order of the data set; the random state of the run stays.

    Args:
        trainer: Its one training loader is read.

    Raises:
        FaspError: If it is streamed, or its batches have padding, positions or different lengths.
    """
    loaders = training_loaders(trainer)
    loader = loaders[0] if len(loaders) == 1 else None
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise FaspError(
            "top_k must be null but for training data of one DataLoader that is not streamed, got "
            f"{', '.join(type(one).__name__ for one in loaders) or 'none'}: a teacher that answers once must know all "
            f"sequences; {LIVE}, or let the data module cache the text (streaming: false)"
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "generator": torch.Generator()}
    with isolated_random_state():
        found = [_ids(read_batch(batch)) for batch in DataLoader(loader.dataset, batch_size=size, **options)]
    if len({ids.shape[1] for ids in found}) != 1:
        raise FaspError(f"top_k must be null with training batches of several lengths; {LIVE}, or cut them alike")
    return Sequences(torch.cat(found))


def validation_sequences(trainer: Trainer, batches: int) -> Sequences | None:
    """Those of the first batches of each validation loader, in all processes; the random state of the run stays.

    Args:
        trainer: Its validation loaders are read.
        batches: How many of each, in each process.

    Returns:
        ``None`` without any, and where padding, positions or several lengths keep a teacher from answering once.
    """
    processes = Processes.everyone()
    with isolated_random_state(), processes.together():
        loaders = validation_loaders(trainer) if batches else []
        read = [read_batch(batch) for loader in loaders for batch in islice(loader, batches)]
    mine = [batch.input_ids.cpu() for batch in read] if all(map(_is_plain, read)) else None
    gathered = processes.gather(mine)
    found = [ids for one in gathered if one is not None for ids in one]
    if None in gathered or len({ids.shape[1] for ids in found}) != 1:
        return None
    return Sequences(torch.cat(found))


def cache_of(trainer: Trainer) -> Path:
    """Where the data module keeps its tokenised text, else where it would by default."""
    folder = getattr(trainer.datamodule, "cache_dir", None)  # type: ignore[attr-defined]
    return default_cache() if folder is None else Path(folder).expanduser()


def _ids(batch: TokenBatch) -> Tensor:
    """(batch, seq) token ids, which alone must decide on what is said of them."""
    if not _is_plain(batch):
        raise FaspError(f"top_k must be null with batches that have padding or position_ids; {LIVE}")
    return batch.input_ids


def _is_plain(batch: TokenBatch) -> bool:
    """Whether its token ids alone decide on what is said of it."""
    plain = batch.unmasked()
    return plain.attention_mask is None and plain.position_ids is None


def _compute(
    store: AnswerStore, numbers: list[int], teacher: Teacher, sequences: Tensor, device: torch.device, first: bool
) -> None:
    """Ask about the sequences of some files, and write them."""
    require_space(store.folder, store.size)
    step = max(1, BATCH_TOKENS // sequences.shape[1])
    pieces = store.pieces()
    for done, number in enumerate(numbers, 1):
        asked = sequences[pieces[number].start : pieces[number].stop]
        told: list[Any] = [teacher(TokenBatch(ids.to(device))) for ids in asked.split(step)]
        store.write(number, TopK(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*told, strict=True))))
        if first:
            log.info("the teacher's answers: %d of %d files of %d sequences", done, len(numbers), len(asked))
