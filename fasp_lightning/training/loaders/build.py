"""Build the loader of the training text: of cached sequences, or of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.staging import fingerprint
from fasp_lightning.text.batches import check_vocabulary
from fasp_lightning.text.config import describe
from fasp_lightning.text.mixing import shares_of
from fasp_lightning.text.packed_cache import without
from fasp_lightning.text.role_cache import RoleCache
from fasp_lightning.text.roles import RoleTexts
from fasp_lightning.text.shuffling import TrainingSampler
from fasp_lightning.text.token_stream import TokenStream
from fasp_lightning.training.loaders.cached import PackedSequences, ResumableLoader
from fasp_lightning.training.loaders.streamed import StreamLoader
from fasp_lightning.training.trainer.resuming import BatchProgress


@dataclass(frozen=True)
class TrainingOptions:
    """How a process reads the training text.

    Attributes:
        batch_size: Sequences of a batch of one process.
        seed: Seed of the order.
        sequences_per_epoch: Sequences of an epoch, of all processes together; None takes all.
        num_workers: Worker processes of the loader.
        rank: This process.
        world_size: Number of processes.
        progress: What became of the batches.
        vocabulary: Embeddings of the model, which streamed tokens are held against; None where it is not known.
    """

    batch_size: int
    seed: int
    sequences_per_epoch: int | None
    num_workers: int
    rank: int
    world_size: int
    progress: BatchProgress
    vocabulary: int | None = None


def cached_loader(cache: RoleCache, options: TrainingOptions) -> ResumableLoader:
    """A loader of tokenised text.

    Raises:
        FaspError: If an epoch has not a batch for each process.
    """
    texts = cache.get("train")
    data = PackedSequences([text.sequences for text in texts])
    total = options.sequences_per_epoch or len(data)
    _check_batches(total, cache.seq_len, options)
    counts = shares_of(data.lengths, _weights(cache.roles), total)
    sampler = TrainingSampler(data.lengths, counts, options.batch_size, options.seed, options.rank, options.world_size)
    order = _order(options, counts=counts, texts=[text.content for text in texts], seq_len=cache.seq_len)
    return ResumableLoader(
        data,
        batch_size=options.batch_size,  # by name: Lightning may put a sampler of its own in its place
        sampler=sampler,
        progress=options.progress,
        order=order,
        num_workers=options.num_workers,
    )


def stream_loader(cache: RoleCache, options: TrainingOptions) -> StreamLoader:
    """A loader of text that is tokenised on the fly.

    Raises:
        FaspError: If an epoch has not a batch for each process.
    """
    texts, taken = cache.roles.texts["train"], cache.taken("train")
    total = options.sequences_per_epoch or 0
    _check_batches(total, cache.seq_len, options)
    stream = TokenStream(
        [(describe(text), partial(_open, cache.roles, index, taken)) for index, text in enumerate(texts)],
        _weights(cache.roles),
        cache.packings["train"],
        options.batch_size,
        options.seed,
        options.rank,
        options.world_size,
        max(1, options.num_workers),
    )
    check = None
    if options.vocabulary is not None:
        names = ", ".join(describe(text) for text in texts)
        check = partial(check_vocabulary, vocab_size=options.vocabulary, text=names)
    batches = total // (options.batch_size * options.world_size)
    keys = [cache.key("train", index, None) for index in range(len(texts))]
    order = _order(options, weights=stream.weights, texts=keys)
    gather = partial(_gather, options.rank)
    return StreamLoader(stream, batches, options.num_workers, options.progress, gather, order, check)


def _check_batches(total: int, seq_len: int, options: TrainingOptions) -> None:
    if total < options.batch_size * options.world_size:
        raise FaspError(
            f"an epoch must fill a batch on every process: it has {total} sequences of seq_len={seq_len}, got "
            f"batch_size={options.batch_size} on {options.world_size} processes; give more text, raise "
            "sequences_per_epoch where it is set, or lower one of these"
        )


def _weights(roles: RoleTexts) -> list[float] | None:
    """The ``epoch_weight`` of each training text, if they have any."""
    return [text.epoch_weight for text in roles.texts["train"] if text.epoch_weight is not None] or None


def _order(options: TrainingOptions, **parts: Any) -> str:
    """Name everything that decides on the order of the training sequences."""
    return fingerprint(options.seed, options.batch_size, options.world_size, parts)


def _open(roles: RoleTexts, index: int, taken: frozenset[str]) -> Iterator[str]:
    """Documents of a training text, without those of other roles."""
    return without(roles.documents("train", index), taken)


def _gather(rank: int, state: Any) -> list[Any]:
    """What the processes have that get different data, in their order."""
    return [state for _, state in sorted(dict(Processes.everyone().gather((rank, state))).items())]
