"""A run that an error ends: its checkpoint needs no other process, and holds what this one has."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import UserModule, half, loader, trainer
from tiny import tiny_model

from fasp_lightning.pruning.processes import Processes
from fasp_lightning.training.callback import UNSAVED
from fasp_lightning.training.trainer.random_state import random_states, restore_own


class Broken(L.Callback):
    """Raises after the second batch of a window of three."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            raise KeyError("broken")


def test_checkpoint_of_an_error_waits_for_nobody(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may wait in a backward, for ever: no collective call is made."""

    def waits(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective call")

    saver = ModelCheckpoint(tmp_path, filename="error", save_on_exception=True, save_top_k=0, save_last=True)
    run = trainer(tmp_path, half(1), Broken(), saver, enable_checkpointing=True, accumulate_grad_batches=3)

    class Others(L.Callback):
        """From the start of the training on, every call of another process fails."""

        def on_train_start(self, *_: Any) -> None:
            monkeypatch.setattr(torch.distributed, "all_gather_object", waits)
            monkeypatch.setattr(torch.distributed, "all_reduce", waits)
            monkeypatch.setattr(run.strategy, "barrier", waits)
            fasp._processes = Processes(object())  # type: ignore[arg-type]

    fasp: Any = run.callbacks[0]
    run.callbacks.insert(0, Others())
    with pytest.raises(KeyError):
        run.fit(UserModule(tiny_model("llama").train()), loader())
    (path, *_) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved[UNSAVED]["gradients"]
    assert len(saved["callbacks"]["FASPPruning"]["random"]) == 1


def test_process_finds_its_own_random_state_or_none() -> None:
    states = random_states(Processes())
    expected = torch.rand(2)
    restore_own([None])
    assert not torch.equal(torch.rand(2), expected)
    restore_own(states)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("zero_first", [False, True])
def test_module_that_optimizes_by_itself_resumes_with_its_pending_gradients(zero_first: bool, tmp_path: Any) -> None:
    class Manual(UserModule):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer: Any = self.optimizers()
            if zero_first and index % 3 == 0:
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            if index % 3 == 2:
                optimizer.step()
                if not zero_first:
                    optimizer.zero_grad()

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "pending.ckpt")
                found.extend(one.grad.clone() for one in pl_module.parameters())

    class Resumed(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            taken.append([one.grad.clone() for one in pl_module.parameters()])

    found: list[torch.Tensor] = []
    taken: list[list[torch.Tensor]] = []
    options = {"max_epochs": 1, "max_steps": -1}
    trainer(tmp_path, half(1), Saving(), **options).fit(Manual(tiny_model("llama").train()), loader(12))
    module = Manual(tiny_model("llama").train())
    trainer(tmp_path, half(1), Resumed(), **options).fit(module, loader(12), ckpt_path=tmp_path / "pending.ckpt")
    assert all(map(torch.equal, taken[0], found))
