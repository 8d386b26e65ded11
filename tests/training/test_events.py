"""The work of one event: its data are checked first, and perplexity is measured beside the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from runs import UserModule, half, loader, trainer
from tiny import tiny_model
from torch.utils.data import DataLoader

from fasp_lightning import perplexity
from fasp_lightning.training.events import Quality, validation_quality


def test_validation_data_without_token_ids(tmp_path: Any) -> None:
    module, data = UserModule(tiny_model("llama")), [{"ids": torch.ones(1, 3)}]
    with pytest.raises(ValueError, match=r"validation data must be .* got keys \['ids'\]; or set validation_batches=0"):
        trainer(tmp_path, half(validation_batches=1), num_sanity_val_steps=0).fit(module, loader(), DataLoader(data))


def test_run_without_validation_data_is_pruned_and_not_measured(tmp_path: Any) -> None:
    module, callback = UserModule(tiny_model("llama").train()), half()
    callback.validation_batches = 2
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.records[0].perplexity_before is None
    assert module.lm.config.intermediate_size == 24


class Measuring(L.Callback):
    """Measures the perplexity of the model before the third step."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.found: float | None = None
        self.expected = 0.0
        self.undisturbed = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            state = torch.get_rng_state()
            self.found = validation_quality(trainer, pl_module.lm, self.batches).perplexity
            self.undisturbed = torch.equal(state, torch.get_rng_state()) and pl_module.lm.training
            self.expected = perplexity(pl_module.lm, list(loader(6))[: self.batches])


@pytest.mark.parametrize("batches", [1, 2, 16])
@pytest.mark.parametrize("workers", [0, 1])
def test_perplexity_is_that_of_the_first_batches(batches: int, workers: int, tmp_path: Any) -> None:
    measuring = Measuring(batches)
    run = trainer(tmp_path, measuring, max_steps=4, num_sanity_val_steps=0)
    run.fit(UserModule(tiny_model("llama").train()), loader(), loader(6, num_workers=workers))
    assert measuring.found == pytest.approx(measuring.expected, rel=1e-6)
    assert measuring.undisturbed


@pytest.mark.parametrize(("batches", "data"), [(0, loader(4)), (2, None)], ids=["none asked for", "no data"])
def test_perplexity_is_not_measured(batches: int, data: Any, tmp_path: Any) -> None:
    class NotMeasuring(Measuring):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.undisturbed = validation_quality(trainer, pl_module.lm, self.batches) == Quality()

    measuring = NotMeasuring(batches)
    trainer(tmp_path, measuring, max_steps=1).fit(UserModule(tiny_model("llama").train()), loader(), data)
    assert measuring.undisturbed
