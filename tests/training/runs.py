"""Tiny runs that the Lightning part's tests share: a user's own module, its data, its Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from tiny import FFN, HIDDEN, random_tokens, tiny_model
from tiny_lightning import silent
from tiny_pruning import basic
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasp_lightning.training.callback import FASPPruning

FFN_ONLY = basic(attention="none")
HALF_FFN = 3 * HIDDEN * FFN / 2 / (3 * HIDDEN * FFN + 4 * HIDDEN * HIDDEN)
"""Sparsity at which the tiny llama loses every second FFN unit."""


class UserModule(L.LightningModule):
    """What a user might write around a causal LM."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any] | None = None, scheduler: Any = None) -> None:
        super().__init__()
        self.lm = model
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.make_scheduler = scheduler
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.lm(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.lm(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Memory(Logger):
    """Keeps what is logged: (step, name) → value."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[int, str], float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.values |= {(step or 0, name): float(value) for name, value in metrics.items()}

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        pass

    def steps(self, name: str) -> dict[int, float]:
        """Step → value of one metric."""
        return {step: value for (step, found), value in self.values.items() if found == name}


class Batches(L.Callback):
    """Keeps what each training batch is, and a draw from the random state at it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch.tolist(), torch.rand(1).item()))


class Interrupted(Exception):
    """Ends a run."""


class Interrupting(L.Callback):
    """Saves a checkpoint after an epoch, and ends the run."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)
        raise Interrupted


def loader(sequences: int = 40, batch_size: int = 2, **options: Any) -> DataLoader:
    """Batches of random token ids."""
    return DataLoader([random_tokens(1, seed=seed)[0] for seed in range(sequences)], batch_size=batch_size, **options)


def trainer(tmp_path: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A silent Trainer of some steps on the CPU."""
    return silent(tmp_path, **{"callbacks": list(callbacks), "max_steps": 10, "limit_val_batches": 2} | options)


def half(step: int = 4, **options: Any) -> FASPPruning:
    """The callback that cuts every second FFN unit."""
    settings: dict[str, Any] = {"pruning": FFN_ONLY, "calibration_sequences": 8, "validation_batches": 0}
    return FASPPruning([{"step": step, "sparsity": HALF_FFN}], **{**settings, **options})


@torch.no_grad()
def half_dead(name: str = "llama") -> nn.Module:
    """A tiny model whose every second FFN unit is dead: it gives nothing, and gets no gradient."""
    model: Any = tiny_model(name)
    for block in model.model.layers:
        block.mlp.gate_proj.weight[::2] = 0
        block.mlp.up_proj.weight[::2] = 0
        block.mlp.down_proj.weight[:, ::2] = 0
    return model.train()
