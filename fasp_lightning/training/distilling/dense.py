"""The model before its first pruning: whether it still is what its source holds, and writing it down if not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer

from fasp_lightning.pruning.own_text.cache import weights_digest
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.adapters import is_adapter_parameter
from fasp_lightning.training.modeling.export import export_model
from fasp_lightning.training.modeling.lora import stock_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def holds_same_weights(read: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether a model was not trained since it was read, up to the rounding of the narrower dtype of both.

    Args:
        read: What its source holds, without adapters.
        model: The model; adapters that do nothing yet (B = 0) do not count.
    """
    there = dict(read.named_parameters())
    for name, value in model.named_parameters():
        if is_adapter_parameter(name):
            if "lora_B" in name and value.any():
                return False
            continue
        other = there.get(stock_name(model, name))
        if other is None:
            return False
        dtype = min(value.dtype, other.dtype, key=lambda one: one.itemsize)
        if not torch.equal(value.to("cpu", dtype), other.to("cpu", dtype)):
            return False
    return True


@contextmanager
def written_beside(trainer: Trainer, model: PreTrainedModel) -> Iterator[tuple[Path, bool]]:
    """Write a model that was never pruned, adapters merged: beside a run's checkpoints, if it has some.

    Args:
        trainer: The Trainer; of several processes the first one writes.
        model: The model.

    Yields:
        The folder, and whether it lasts: without checkpoints it is a temporary one.
    """
    place, dtype = _place(trainer), str(model.dtype).removeprefix("torch.")
    if place is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield export_model(model, temporary, dtype=dtype), False
        return
    folder, processes = place / f"teacher-{weights_digest(model)[:12]}", Processes.everyone()
    with processes.together():
        if processes.is_first and not folder.exists():  # it is renamed when it is whole
            export_model(model, folder, dtype=dtype)
    yield folder, True


def _place(trainer: Trainer) -> Path | None:
    """The folder of the run's checkpoints; ``None`` without one on a disk."""
    callback = trainer.checkpoint_callback
    folder = getattr(callback, "dirpath", None)
    return None if folder is None or "://" in str(folder) else Path(folder)
