"""One tiny run that stops or kills itself at a given point, and if run again goes on from its newest checkpoint."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers.logger import Logger
from resume_stops import BATCHES, EPOCHS, After, Before, Checkpoints, Stop, Stopper, watched_calibration
from runs import UserModule, loader
from tiny import TINY
from tiny_lightning import SCRATCH
from tiny_pruning import basic
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning import (
    CausalLMDataModule,
    CausalLMModule,
    DistillationConfig,
    FASPPruning,
    LoRAConfig,
    PruningConfig,
)
from fasp_lightning.pruning.config import LearningConfig, OwnTextConfig
from fasp_lightning.text.config import TextConfig

EVENTS = [{"step": 2, "sparsity": 0.15}, {"epoch": 2, "sparsity": 0.3}]
DROPOUT = 0.2
LORA = LoRAConfig(rank=2, dropout=DROPOUT)
CONFIG = {**SCRATCH, "dropout": DROPOUT}
LLAMA = {**TINY["llama"].config().to_diff_dict(), "attention_dropout": DROPOUT}
PRUNING = {
    "plain": basic(attention="value_dims"),
    "everything": PruningConfig(
        attention="value_dims",
        head_balance="free",
        score="fisher",
        allocation="adaptive",
        damping="auto",
        own_text=OwnTextConfig(tokens=48, seq_len=12),
    ),
    "groups": basic(attention="kv_groups", score="fisher"),
    "learned": basic(score="learned", learning=LearningConfig(steps=3, tokens=24, rate=0.5)),
}
"""Settings of the engine; whole KV groups are cut from a llama, since an OPT has none."""


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        foreign: A user's own module and shuffling DataLoader, instead of this package's.
        recovery: As in the callback.
        lora: The module comes with adapters of its own.
        accumulate: Batches of a step.
        saves: When checkpoints are written: at the end of each "step", "epoch" or "validation", or on an "error".
        validate_every: Batches between validations; None is once an epoch.
        by_steps: The run ends by max_steps, not by max_epochs.
        plateau: The learning rate falls by what validation gives.
        distilled: Recovery is by distillation, from the model as it was trained until the first event.
        settings: A key of ``PRUNING``.
    """

    foreign: bool = False
    recovery: Any = "none"
    lora: bool = False
    accumulate: int = 1
    saves: str = "step"
    validate_every: int | None = None
    by_steps: bool = False
    plateau: bool = False
    distilled: bool = False
    settings: str = "plain"

    @property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        return LLAMA if self.settings == "groups" else CONFIG


class Lines(Logger):
    """A line of JSON for each call, in the file at once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    name = version = ""  # type: ignore[assignment]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, metrics]) + "\n")

    def last(self) -> dict[tuple[int, str], float]:
        """(step, metric) → its last value."""
        lines = map(json.loads, self.path.read_text().splitlines())
        return {(step, name): value for step, metrics in lines for name, value in metrics.items()}


class Noisy(UserModule):
    """A user's module that draws from every global generator as it trains."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        loss = loss * (1 + random.random()) * (1 + np.random.rand())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


def fit(run: Run, folder: Path, stop: Stop | None = None) -> None:
    """Run, from the newest checkpoint in the folder if there is one; ``outcome.pt`` is what it ends with."""
    torch.set_num_threads(1)
    ckpt = newest(folder)
    seed_all(0 if ckpt is None else 1)
    stopper = Stopper(stop)
    before, pruning = Before(stopper), new_pruning(run)
    checkpoints = Checkpoints(stopper, folder / "checkpoints", run.saves)
    module, data = new_foreign(run) if run.foreign else new_own(run, folder)
    with watched_calibration(stopper):
        new_trainer(run, folder, [before, pruning, After(stopper), checkpoints]).fit(module, **data, ckpt_path=ckpt)
    records = [{**asdict(record), "seconds": 0.0} for record in pruning.records]
    merged = {name: value.clone() for name, value in module.state_dict().items()}
    torch.save({**before.final, "merged": merged, "records": records}, folder / "outcome.pt")


def newest(folder: Path) -> Path | None:
    """The checkpoint that was written last."""
    return max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def seed_all(seed: int) -> None:
    """What Python, numpy and torch begin with; nothing of a resumed run may depend on it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def new_pruning(run: Run) -> FASPPruning:
    """Two events: in the middle of the first epoch, and at the start of the third."""
    config, more = PRUNING[run.settings], {"calibration_sequences": 6, "validation_batches": 2}
    return FASPPruning(EVENTS, config, run.recovery, LORA, **more)


def new_trainer(run: Run, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """A silent Trainer on the CPU."""
    steps = EPOCHS * -(-BATCHES // run.accumulate)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=Lines(folder / "metrics.jsonl"),
        log_every_n_steps=1,
        accumulate_grad_batches=run.accumulate,
        val_check_interval=run.validate_every or 1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_steps": steps} if run.by_steps else {"max_epochs": EPOCHS}),
    )


def new_own(run: Run, folder: Path) -> tuple[L.LightningModule, dict[str, Any]]:
    """This package's module and datamodule, on the text and tokenizer of the folder beside."""
    text = folder.parent / "text"
    data = CausalLMDataModule(
        str(text / "tokenizer"),
        train=[TextConfig(str(text / "train.jsonl"))],
        validation=[TextConfig(str(text / "validation.jsonl"), sequences=6)],
        calibration=[TextConfig(str(text / "calibration.jsonl"), sequences=12)],
        test=[TextConfig(str(text / "validation.jsonl"))],
        seq_len=12,
        batch_size=2,
        sequences_per_epoch=2 * BATCHES,
        cache_dir=str(text / "cache"),
    )
    schedule = watching if run.plateau else falling
    module = CausalLMModule(
        config=run.config,
        lora=LORA if run.lora else None,
        distillation=DistillationConfig(label_weight=0.5) if run.distilled else None,
        optimizer=adamw,
        lr_scheduler=schedule,
    )
    return module, {"datamodule": data}


def new_foreign(run: Run) -> tuple[L.LightningModule, dict[str, Any]]:
    """A user's own module and plain loaders, which draw from the global generator."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**run.config))
    train = loader(2 * BATCHES, shuffle=True)
    return Noisy(model.train(), adamw, falling), {"train_dataloaders": train, "val_dataloaders": loader(6)}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Moments and steps to lose."""
    return torch.optim.AdamW(parameters, lr=1e-2)


def falling(optimizer: torch.optim.Optimizer) -> Any:
    """A learning rate that differs at each step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


def watching(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """A learning rate that falls after each validation: none is so much better than the first."""
    return ReduceLROnPlateau(optimizer, "val_loss", factor=0.7, patience=0, threshold=10.0)
