"""Called by ``test_ddp.py`` in two processes: several runs under ddp, one after the other.

Each process writes what it has after every run to
``FOLDER/RUN-RANK.pt``. The last run ends with an error in one process, and nobody catches it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import UserModule, loader, trainer
from tiny import VOCAB, random_tokens, tiny_model
from tiny_lightning import SCRATCH
from tiny_pruning import basic
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from fasp_lightning import PruningConfig
from fasp_lightning.pruning.config import LearningConfig, OwnTextConfig
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.distiller import distiller_of
from fasp_lightning.training.distilling.loss import distillation_loss
from fasp_lightning.training.modeling.lora import LoRAConfig
from fasp_lightning.training.module import CausalLMModule

EVENTS = [{"step": 1, "sparsity": 0.1}, {"step": 3, "sparsity": 0.2}]
UNTRAINED = VOCAB - 1
"""A token that no training batch has."""


class Noting(UserModule):
    """A user's own module, calibrated on its own data; notes which sequences each event was given."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(tiny_model("llama").train(), optimizer)
        self.calibrated: list[Tensor] = []
        self.calibration: list[Tensor] = [random_tokens(1, seed=seed)[0] for seed in range(100, 112)]
        self.validation = loader(8).dataset
        self.collate: Callable[[list[Tensor]], Tensor] = default_collate

    def train_dataloader(self) -> DataLoader:
        """Batches of four in all processes together, in order, which Lightning's own sampler would shuffle."""
        count, data = self.trainer.world_size, loader(40).dataset
        sampler = DistributedSampler(data, count, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=4 // count, sampler=sampler)

    def calibration_dataloader(self) -> DataLoader:
        def collate(batch: list[Tensor]) -> Tensor:
            self.calibrated.extend(batch)
            return self.collate(batch)

        return DataLoader(self.calibration, batch_size=2, collate_fn=collate)


def fasp(**options: Any) -> FASPPruning:
    """Cuts FFN units and value dims, twice; 9 calibration sequences do not divide evenly."""
    settings: dict[str, Any] = {"pruning": basic(attention="value_dims"), "calibration_sequences": 9}
    return FASPPruning(EVENTS, **{**settings, **options})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


INGREDIENTS = PruningConfig(
    attention="value_dims",
    head_balance="free",
    score="fisher",
    allocation="adaptive",
    own_text=OwnTextConfig(tokens=5 * 12, seq_len=12),
)
LEARNED = basic(score="learned", learning=LearningConfig(steps=4, tokens=24, rate=0.5))
GROUPS = basic(attention="kv_groups", score="fisher")


def plain(folder: Path, processes: int = 2, **options: Any) -> tuple[Noting, L.Trainer, FASPPruning]:
    """The same data in all processes together, for any number of them."""
    module, callback = Noting(sgd), fasp(**options)
    made = fit(folder, module, callback, processes)
    return module, made, callback


def fit(
    folder: Path, module: Noting, callback: FASPPruning, processes: int = 2, *more: L.Callback, **options: Any
) -> L.Trainer:
    options = {"max_steps": 5, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0} | options
    options |= {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    made = trainer(folder, callback, *more, **options | {"enable_checkpointing": bool(more)})
    made.fit(module, val_dataloaders=DataLoader(module.validation, batch_size=4 // processes))
    return made


class Distilled(Noting):
    """Learns from what it was before the first event."""

    def __init__(self, top_k: int | None) -> None:
        super().__init__(sgd)
        self.distillation = DistillationConfig(label_weight=0.5, top_k=top_k)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        distiller = distiller_of(self)
        assert distiller is not None
        logits = self.lm(input_ids=batch, use_cache=False).logits
        loss = distillation_loss(logits, distiller.teacher, batch, self.distillation)
        self.losses.append(loss.item())
        return loss


def distilled(folder: Path, processes: int = 2, top_k: int | None = None) -> tuple[Noting, L.Trainer, FASPPruning]:
    """The teacher is written by the first process, beside the checkpoints, or each writes some of its answers."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    module, callback = Distilled(top_k), fasp()
    saver = ModelCheckpoint(dirpath=folder / "distilled", every_n_train_steps=5)
    return module, fit(folder, module, callback, processes, saver), callback


def full(folder: Path) -> tuple[Any, L.Trainer, FASPPruning]:
    """Before the first event only the head trains."""
    module, callback = Noting(adamw), fasp(recovery="full")
    module.lm.model.requires_grad_(False)
    return module, fit(folder, module, callback), callback


def lora(folder: Path) -> tuple[Any, L.Trainer, FASPPruning]:
    """The callback injects adapters; everything trains before the first event."""
    module, callback = Noting(adamw), fasp(recovery="lora", lora=LoRAConfig(rank=2))
    return module, fit(folder, module, callback), callback


def resumable(folder: Path, rank: int, ckpt_path: Path | None = None) -> tuple[Any, L.Trainer, FASPPruning]:
    """Two epochs of three steps, each process with dropout of its own; a checkpoint at the end of each epoch."""
    torch.manual_seed(rank if ckpt_path is None else 100 + rank)
    module = CausalLMModule(config=SCRATCH, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    schedule = [{"step": 1, "sparsity": 0.1}, {"step": 4, "sparsity": 0.2}]
    callback = FASPPruning(schedule, basic(), calibration_sequences=8, validation_batches=1)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
    made = trainer(folder, callback, saver, strategy="ddp", devices=2, **options)
    made.fit(module, loader(12), loader(4), ckpt_path=ckpt_path, weights_only=True)
    return module, made, callback


def not_finite(module: Noting) -> None:
    module.calibration[1] = torch.full_like(module.calibration[1], UNTRAINED)
    with torch.no_grad():
        module.lm.get_input_embeddings().weight[UNTRAINED] = torch.nan


def out_of_range(module: Noting) -> None:
    module.calibration[1] = torch.full_like(module.calibration[1], VOCAB)


def validation_out_of_range(module: Noting) -> None:
    module.validation = [*module.validation[:1], torch.full_like(module.validation[1], VOCAB), *module.validation[2:]]


def breaks_in_one(module: Noting) -> None:
    marked = module.calibration[1]

    def collate(batch: list[Tensor]) -> Tensor:
        if any(torch.equal(one, marked) for one in batch):
            raise OSError("disk gone")
        return default_collate(batch)

    module.collate = collate


def failing(folder: Path, spoil: Callable[[Noting], None]) -> None:
    """The second sequence, which is spoilt, falls to the second process: all of the calibration data is drawn."""
    module = Noting(sgd)
    spoil(module)
    fit(folder, module, fasp(calibration_sequences=12))


def found(module: Any, made: L.Trainer, callback: FASPPruning) -> dict[str, Any]:
    """What a process has after a run."""
    model = module.lm if isinstance(module, UserModule) else module.model
    (optimizer,) = made.optimizers
    states = [optimizer.state.get(one, {}) for group in optimizer.param_groups for one in group["params"]]
    return {
        "plan": model.fasp_plan.to_json(),
        "weights": model.state_dict(),
        "moments": [{key: value for key, value in state.items() if isinstance(value, Tensor)} for state in states],
        "calibrated": getattr(module, "calibrated", None),
        "losses": getattr(module, "losses", None),
        "perplexities": [
            (record.perplexity_before, record.perplexity_pruned, record.perplexity_recovered)
            for record in callback.records
        ],
        "divergences": [(record.kl_pruned, record.kl_recovered) for record in callback.records],
    }


def main(folder: Path) -> None:
    """All runs."""

    def note(run: str, make: Callable[[], Any]) -> int:
        try:
            module, made, callback = make()
            outcome, rank = found(module, made, callback), made.global_rank
        except Exception as error:
            rank = torch.distributed.get_rank()
            outcome = {"message": f"{type(error).__name__}: {error}"}
        torch.save(outcome, folder / f"{run}-{rank}.pt")
        return rank

    rank = note("none", lambda: plain(folder))
    note("ingredients", lambda: plain(folder, pruning=INGREDIENTS))
    note("groups", lambda: plain(folder, pruning=GROUPS))
    note("distilled", lambda: distilled(folder))
    note("answered", lambda: distilled(folder, top_k=8))
    note("learned", lambda: plain(folder, pruning=LEARNED))
    note("full", lambda: full(folder))
    note("lora", lambda: lora(folder))
    note("whole", lambda: resumable(folder, rank))
    note("resumed", lambda: resumable(folder / "resumed", rank, folder / "epoch=0.ckpt"))
    note("finite", lambda: failing(folder, not_finite))
    note("token", lambda: failing(folder, out_of_range))
    note("validation", lambda: failing(folder, validation_out_of_range))
    failing(folder, breaks_in_one)
