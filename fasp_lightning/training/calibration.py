"""Calibration batches of an event: from a calibration loader, or from the training data without changing its order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from fasp_lightning.errors import FaspError
from fasp_lightning.text.batches import as_mapping, read_batch
from fasp_lightning.training.trainer.surgery import training_loader


def calibration_loader(trainer: Trainer, module: LightningModule) -> DataLoader:
    """The loader of calibration sequences: that of the datamodule, else that of the module, else the training loader.

    Args:
        trainer: In ``fit``.
        module: Its LightningModule.

    Raises:
        FaspError: If there is neither such a method nor one training DataLoader.
    """
    for make in _hooks(trainer, module):
        loader = make()
        if not isinstance(loader, DataLoader):
            raise FaspError(f"{make.__qualname__}() must return a DataLoader, got {type(loader).__name__}")
        return loader
    return training_loader(trainer)


def has_calibration_loader(trainer: Trainer, module: LightningModule) -> bool:
    """Whether datamodule or module have a ``calibration_dataloader()``."""
    return bool(_hooks(trainer, module))


def _hooks(trainer: Trainer, module: LightningModule) -> list[Any]:
    owners = (trainer.datamodule, module)  # type: ignore[attr-defined]
    return [owner.calibration_dataloader for owner in owners if hasattr(owner, "calibration_dataloader")]


@dataclass(frozen=True)
class Draw:
    """Which calibration sequences an event takes.

    They are drawn without replacement by a generator that depends on ``seed`` and ``event`` alone. The loader itself is
    not iterated: its data set, batch size and collate function are read in another one, so that a loader of training
    data keeps its place, and the global random state stays.

    Attributes:
        loader: A loader of the data set to draw from. An iterable data set is read in its order instead of drawn from:
            each event takes the sequences that follow those of the event before.
        sequences: Sequences in all processes together; all there are if the data set is smaller.
        seed: Seed of the drawing.
        event: Index of the event.
    """

    loader: DataLoader
    sequences: int
    seed: int
    event: int

    def batches(self, rank: int = 0, count: int = 1) -> Iterator[Any]:
        """Yield one process's part of the sequences, each batch as a mapping, with all that it holds.

        Args:
            rank: Index of the process.
            count: Number of processes.

        Raises:
            FaspError: If this process gets no batch, the data set cannot be read beside the training, or a batch
                holds no token ids.
        """
        left = -(-self.sequences // count)
        for batch in self._read(rank, count):
            given = read_batch(batch, "calibration data", "give the datamodule a calibration_dataloader()")
            yield as_mapping(batch)
            left -= len(given.input_ids)
            if left <= 0:
                return
        if left == -(-self.sequences // count):
            raise FaspError(
                f"calibration data must give each of {count} processes a batch, got none for process {rank}; "
                "give more sequences"
            )

    def _read(self, rank: int, count: int) -> Iterator[Any]:
        loader = self.loader
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        options: dict[str, Any] = {"batch_size": size, "collate_fn": loader.collate_fn, "generator": torch.Generator()}
        if isinstance(loader.dataset, IterableDataset):
            batches = -(-self.sequences // ((size or 1) * count)) * count
            fresh = DataLoader(_copied(loader.dataset), **options)
            return islice(fresh, self.event * batches + rank, (self.event + 1) * batches, count)
        total = len(loader.dataset)  # type: ignore[arg-type]  # map-style
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.event))
        mine = order[: self.sequences].sort().values[rank::count].tolist()
        return iter(DataLoader(loader.dataset, sampler=mine, **options))


def _copied(dataset: IterableDataset) -> IterableDataset:
    """A copy to read from, so that the training goes on with the original where it is."""
    try:
        return copy.deepcopy(dataset)
    except TypeError as error:
        raise FaspError(
            f"training data must be copied to be read beside the training, and {type(dataset).__name__} cannot "
            f"({error}); give the datamodule or module a calibration_dataloader()"
        ) from error
