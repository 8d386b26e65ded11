"""Called by ``test_pruning_sharded.py`` in two or four processes: several runs under FSDP2, one after the other.

Each process writes what it has after every run to ``FOLDER/RUN-RANK.pt``. The last run ends with an error in one
process, and nobody catches it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from ddp_run import Noting, breaks_in_one, fasp, out_of_range, sgd, validation_out_of_range
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import half, half_dead, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

ADAMW = partial(torch.optim.AdamW, lr=1e-2)


class Sharded(Noting):
    """A user's own module, which shards its blocks and itself."""

    def __init__(self, model: nn.Module | None = None, optimizer: Any = ADAMW) -> None:
        super().__init__(optimizer)
        self.lm = model or self.lm

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.lm.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.lm, mesh=mesh)


def fit(folder: Path, module: Noting, *callbacks: L.Callback, processes: int = 2, **options: Any) -> L.Trainer:
    """Six steps, on four sequences each in all processes together."""
    checkpoint = options.pop("ckpt_path", None)
    options = {"max_steps": 6, "num_sanity_val_steps": 0, "gradient_clip_val": 0.5} | options
    if processes > 1:
        options["strategy"] = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
        options["devices"] = processes
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    made = trainer(folder, *callbacks, enable_checkpointing=saves, use_distributed_sampler=False, **options)
    made.fit(module, val_dataloaders=module.validation_part(processes), ckpt_path=checkpoint)
    return made
