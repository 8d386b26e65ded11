"""The order of sequences: a pure function of seed and epoch, dealt to processes by the samplers themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

BLANK = -1
"""Index of a sequence without labels, with which evaluation gives each process equally many."""


def generator(*key: int | str) -> torch.Generator:
    """A generator that depends on the key alone."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)


def epoch_order(lengths: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> Tensor:
    """Order in which an epoch takes the sequences of several texts.

    Each text is an endless row of permutations of its sequences, of which every epoch takes the next ``count``:
    with ``count`` equal to the length each sequence comes once an epoch, with a smaller one all have come after
    as many epochs as it takes, with a larger one none is repeated before all others have come.

    Args:
        lengths: Sequences of each text.
        counts: Sequences that an epoch takes of each.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.

    Returns:
        (Σ counts,) int64 indices into the texts end to end.
    """
    parts, start = [], 0
    for text, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        parts.append(start + _stretch(length, epoch * count, (epoch + 1) * count, (seed, "text", text)))
        start += length
    order = torch.cat(parts)
    return order[torch.randperm(len(order), generator=generator(seed, "epoch", epoch))]


def _stretch(length: int, start: int, end: int, key: tuple[int | str, ...]) -> Tensor:
    """Positions ``start`` to ``end`` of an endless row of permutations of ``length``."""
    passes = range(start // length, -(-end // length))
    row = torch.cat([torch.randperm(length, generator=generator(*key, number)) for number in passes])
    return row[start - passes.start * length : end - passes.start * length]


class TrainingSampler(DistributedSampler[Any]):
    """Deals the order of each epoch to processes.

    Batch by batch, all processes together take what a single one with the joint batch size would take; the
    rest of an epoch that fills no batch on every process is left out, another one in each epoch. It is a
    ``DistributedSampler`` so that Lightning puts none in its place.

    Args:
        lengths: Sequences of each text.
        counts: Sequences that an epoch takes of each.
        batch_size: Sequences of a batch of one process.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, lengths: Sequence[int], counts: Sequence[int], batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__(range(sum(lengths)), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.counts = list(lengths), list(counts)
        self.batches = sum(counts) // (batch_size * world_size)
        self.batch_size = batch_size
        self._next: tuple[int, int] | None = None

    def begin(self, epoch: int, batches: int) -> None:
        """Let the next iteration be of that epoch, without so many of its first batches.

        Otherwise it is of the whole epoch that ``set_epoch`` told.
        """
        self._next = (epoch, batches)

    def __iter__(self) -> Iterator[int]:
        (epoch, batches), self._next = self._next or (self.epoch, 0), None
        order = epoch_order(self.lengths, self.counts, self.seed, epoch)
        mine = order[: self.batches * self.batch_size * self.num_replicas][self.rank :: self.num_replicas]
        return iter(mine[batches * self.batch_size :].tolist())

    def __len__(self) -> int:
        return self.batches * self.batch_size


class EvaluationSampler(DistributedSampler[Any]):
    """Deals each sequence to exactly one process, in order, and blank ones where some would have one less.

    Args:
        length: Number of sequences.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        mine = list(range(self.rank, self.length, self.num_replicas))
        return iter(mine + [BLANK] * (len(self) - len(mine)))

    def __len__(self) -> int:
        return -(-self.length // self.num_replicas)
