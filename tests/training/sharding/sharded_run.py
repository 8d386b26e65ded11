"""Called by ``test_pruning_sharded.py`` in several processes: runs under FSDP2, one after the other.

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
from ddp_run import Noting, fasp, not_finite, out_of_range, sgd, validation_out_of_range
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import half, half_dead, loader, trainer
from tiny import random_tokens
from tiny_lightning import SCRATCH
from tiny_pruning import basic
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from fasp_lightning.pruning.blocks.replay import BlockReplay
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.module import CausalLMModule
from fasp_lightning.training.sharding.shard import reshard

METRICS = ("fasp/perplexity", "fasp/sparsity")
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


class Sharded(Noting):
    """A user's own module, which shards its blocks, and itself."""

    def __init__(self, optimizer: Any = sgd, model: nn.Module | None = None) -> None:
        super().__init__(optimizer)
        self.lm = model or self.lm

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.lm.model.layers:
                fully_shard(block, mesh=mesh, reshard_after_forward=False)
            fully_shard(self.lm, mesh=mesh)


def sharded(processes: int, **options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1, **options)


def fit(folder: Path, processes: int, module: Noting, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Five steps, each of four sequences in all processes together."""
    options = {"max_steps": 5, "num_sanity_val_steps": 0} | options
    options |= {"strategy": sharded(processes), "devices": processes} if processes > 1 else {}
    made = trainer(folder, *callbacks, **options)
    made.fit(module, val_dataloaders=DataLoader(module.validation, batch_size=4 // processes))
    return made


def dead(folder: Path, processes: int, *callbacks: L.Callback) -> Any:
    """Every second unit is dead from the start."""
    torch.manual_seed(0)
    module = Sharded(ADAMW, half_dead())
    return module, fit(folder, processes, module, *callbacks, max_steps=8, gradient_clip_val=0.05)


def plain(folder: Path, processes: int = 2, **options: Any) -> Any:
    """The same data in all processes together, for any number of them."""
    module = Sharded()
    return module, fit(folder, processes, module, fasp(**options), accumulate_grad_batches=2)


def resumable(folder: Path, processes: int, rank: int, full: bool = False, checkpoint: Path | None = None) -> Any:
    """Three epochs of two steps, each process with dropout of its own; a checkpoint at the end of each epoch."""
    torch.manual_seed(rank if checkpoint is None else 100 + rank)
    module = CausalLMModule(config=SCRATCH, optimizer=ADAMW, gradient_checkpointing=True)
    settings: dict[str, Any] = {"calibration_sequences": 8, "validation_batches": 1, "recovery": "blocks"}
    callback = FASPPruning([{"step": 3, "sparsity": 0.1}], basic(), **settings)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 3, "enable_checkpointing": True, "devices": processes}
    strategy = sharded(processes, save_distributed_checkpoint=not full)
    made = trainer(folder, callback, saver, strategy=strategy, **options)
    sequences = 4 * processes
    made.fit(module, loader(sequences), loader(4 * processes), ckpt_path=checkpoint, weights_only=True)
    return module, made


class SavesInWindow(L.Callback):
    """Saves after the first of two batches whose gradients are accumulated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer.save_checkpoint(self.folder / "window.ckpt")


def accumulating(folder: Path, processes: int, checkpoint: Path | None = None) -> Any:
    """Three windows of two batches, all alike: Lightning reads data from its beginning when it resumes."""
    module = CausalLMModule(config=SCRATCH | {"dropout": 0.0}, optimizer=ADAMW)
    callback = FASPPruning([{"step": 1, "sparsity": 0.1}], basic(), calibration_sequences=8, validation_batches=0)
    options = {"strategy": sharded(processes), "devices": processes, "accumulate_grad_batches": 2}
    made = trainer(folder, callback, SavesInWindow(folder), max_steps=3, **options)
    data = DataLoader([random_tokens(1, seed=0)[0]] * 12 * processes, batch_size=2)
    made.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module, made


def failing(folder: Path, processes: int, spoil: Callable[[Noting], None] = lambda module: None) -> None:
    """The second sequence, which may be spoilt, falls to the second process."""
    module = Sharded()
    spoil(module)
    fit(folder, processes, module, fasp(calibration_sequences=12))


def failing_in_block(folder: Path, processes: int) -> None:
    """One process stops where it calibrates the second block, while the others go on to the next collective call."""
    record = BlockReplay.record

    def recording(self: BlockReplay, pair: Any, number: int, statistics: Any) -> Any:
        if self.index == 1 and torch.distributed.get_rank() == 1:
            raise OSError("disk gone")
        return record(self, pair, number, statistics)

    BlockReplay.record = recording  # type: ignore[method-assign]
    failing(folder, processes)


def found(module: Any, made: L.Trainer) -> dict[str, Any]:
    """What a process has after a run; parameters and moments as a whole, and how much of them it has itself."""
    model = module.model if isinstance(module, CausalLMModule) else module.lm
    (optimizer,) = made.optimizers
    reshard(module)  # the last perplexity left what is around the blocks whole
    held = [one for group in optimizer.param_groups for one in group["params"]]
    named = dict(module.named_parameters())
    moments = [optimizer.state.get(one, {}) for one in named.values()]
    return {
        "plan": getattr(model, "fasp_plan", None) and model.fasp_plan.to_json(),
        "weights": {name: whole(one) for name, one in model.named_parameters()},
        "own": sum(own(one).numel() for one in model.parameters()),
        "moments": [{key: whole(one) for key, one in state.items()} for state in moments],
        "held": {id(one) for one in held} == {id(one) for one in named.values()},
        "units": sum(isinstance(one, FSDPModule) for one in model.modules()),
        "losses": getattr(module, "losses", None),
        "metrics": {name: float(value) for name, value in made.callback_metrics.items() if name in METRICS},
    }


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def main(folder: Path, processes: int, more: bool) -> None:
    """All runs; more of them if asked."""

    def note(run: str, make: Callable[[], Any]) -> int:
        try:
            module, made = make()
            outcome, rank = found(module, made), made.global_rank
        except Exception as error:
            rank = torch.distributed.get_rank()
            outcome = {"message": f"{type(error).__name__}: {error}"}
        torch.save(outcome, folder / f"{run}-{rank}.pt")
        return rank

    rank = note("dense", lambda: dead(folder, processes))
    note("cut", lambda: dead(folder, processes, half(step=4, validation_batches=1)))
    note("plain", lambda: plain(folder, processes))
    note("whole", lambda: resumable(folder, processes, rank))
    for epoch in (0, 1):
        start = folder / f"epoch={epoch}.ckpt"
        note(f"from-{epoch}", partial(resumable, folder / f"from-{epoch}", processes, rank, checkpoint=start))
    if more:
        note("token", lambda: failing(folder, processes, out_of_range))
        note("validation", lambda: failing(folder, processes, validation_out_of_range))
        note("finite", lambda: failing(folder, processes, not_finite))
        note("rounds", lambda: plain(folder, processes, pruning=basic(attention="value_dims", rounds=2)))
        note("file", lambda: resumable(folder / "file", processes, rank, full=True))
        for epoch in (0, 1):
            start = folder / "file" / f"epoch={epoch}.ckpt"
            note(f"file-{epoch}", partial(resumable, folder / f"f-{epoch}", processes, rank, True, checkpoint=start))
        note("window", lambda: accumulating(folder, processes))
        note("resumed", lambda: accumulating(folder / "w", processes, folder / "window.ckpt"))
    failing_in_block(folder, processes)
