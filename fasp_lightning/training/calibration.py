"""Calibration batches of one event: from the datamodule's own loader, or from the training data beside its order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fasp_lightning.training.surgery import training_loader


def calibration_loader(trainer: Trainer, module: LightningModule) -> DataLoader:
    """Where an event's calibration sequences come from: the first ``calibration_dataloader()``, else training data.

    Args:
        trainer: In ``fit``.
        module: Its LightningModule.

    Raises:
        ValueError: If there is neither such a method nor one training DataLoader.
    """
    for make in _hooks(trainer, module):
        loader = make()
        if not isinstance(loader, DataLoader):
            raise ValueError(f"{make.__qualname__}() must return a DataLoader, got {type(loader).__name__}")
        return loader
    return training_loader(trainer)


def has_calibration_loader(trainer: Trainer, module: LightningModule) -> bool:
    """Whether datamodule or module have a ``calibration_dataloader()``."""
    return bool(_hooks(trainer, module))


def _hooks(trainer: Trainer, module: LightningModule) -> list[Any]:
    owners = (trainer.datamodule, module)  # type: ignore[attr-defined]
    return [owner.calibration_dataloader for owner in owners if hasattr(owner, "calibration_dataloader")]


def calibration_batches(
    loader: DataLoader, sequences: int, seed: int, event: int, rank: int = 0, count: int = 1
) -> Iterator[Any]:
    """This process's part of the calibration batches of an event.

    The sequences are drawn without replacement by a generator that depends on ``seed`` and ``event`` alone. A loader
    of the training data is only read for what it was made of: its own iteration, and the global random state, stay.

    Args:
        loader: Where data set, collate function and batch size come from. An iterable data set is read in order
            instead, each event the window after the last one's.
        sequences: Sequences in all processes together; all there are if the data set is smaller.
        seed: Seed of the drawing.
        event: Index of the event.
        rank: This process.
        count: Number of processes.

    Yields:
        What :func:`token_inputs` makes of each batch.

    Raises:
        ValueError: If this process gets no batch, or a batch holds no token ids.
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    options: dict[str, Any] = {"batch_size": size, "collate_fn": loader.collate_fn, "generator": torch.Generator()}
    if isinstance(loader.dataset, IterableDataset):
        batches = -(-sequences // (size * count)) * count
        fresh = DataLoader(copy.deepcopy(loader.dataset), **options)
        found: Iterator[Any] = islice(fresh, event * batches + rank, (event + 1) * batches, count)
    else:
        total = len(loader.dataset)  # type: ignore[arg-type]  # map-style
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + event))
        mine = order[:sequences].sort().values[rank::count].tolist()
        found = iter(DataLoader(loader.dataset, sampler=mine, **options))
    empty = True
    for batch in found:
        empty = False
        yield token_inputs(batch)
    if empty:
        raise ValueError(f"calibration data must give each of {count} processes a batch, got none for process {rank}")


def token_inputs(batch: Any) -> Any:
    """The part of a training batch that the model is called with.

    Args:
        batch: Token ids, a mapping with ``input_ids``, or a sequence whose first entry is one of both.

    Returns:
        (batch, seq) token ids, or a mapping with ``input_ids`` and perhaps ``attention_mask``.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(batch, Sequence) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return {key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
    if isinstance(batch, Tensor):
        return batch
    raise TypeError(
        f"a calibration batch must be token ids, a mapping with 'input_ids', or a tuple that starts with one, got "
        f"{type(batch).__name__}; give the datamodule a calibration_dataloader()"
    )
