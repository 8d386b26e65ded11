"""One-shot pruning and resuming in half precision, on the CPU and on an accelerator (GradScaler included)."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from runs import Interrupted, Interrupting, UserModule, half, loader, trainer
from tiny import tiny_model
from tiny_lightning import SCRATCH

from fasp_lightning import CausalLMModule, perplexity

PRECISIONS = [
    ("cpu", "bf16-mixed"),
    ("cpu", "bf16-true"),
    pytest.param("gpu", "16-mixed", marks=pytest.mark.cuda),
    pytest.param("gpu", "bf16-mixed", marks=pytest.mark.cuda),
    pytest.param("gpu", "bf16-true", marks=pytest.mark.cuda),
]


def module() -> UserModule:
    return UserModule(tiny_model("llama").train(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))


@pytest.mark.parametrize(("accelerator", "precision"), PRECISIONS)
def test_one_shot_prunes_where_the_model_is(accelerator: str, precision: str, tmp_path: Any) -> None:
    found = module()
    callback = half(0, validation_batches=1)
    run = trainer(tmp_path, callback, accelerator=accelerator, precision=precision, max_steps=3)
    placed: list[str] = []

    class Place(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            placed.extend(one.device.type for one in pl_module.parameters())
            states = trainer.optimizers[0].state
            assert all(states[one]["exp_avg"].shape == one.shape for one in pl_module.parameters())

    run.callbacks.append(Place())
    run.fit(found, loader(), loader(4))
    assert set(placed) == {"cuda" if accelerator == "gpu" else "cpu"}
    assert found.lm.config.intermediate_size == 24
    assert found.lm.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    (record,) = callback.records
    assert 0 < record.perplexity_pruned < 1e4
    assert 0 < record.perplexity_recovered < record.perplexity_before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_perplexity_of_the_records_is_that_of_validation(precision: Any, tmp_path: Any) -> None:
    """In mixed precision too, which measuring outside of it would not give."""
    found, callback = CausalLMModule(config=SCRATCH), half(1, validation_batches=2)
    run = trainer(tmp_path, callback, precision=precision, max_steps=2)
    run.fit(found, loader(), loader(4))
    (record,) = callback.records
    (logged,) = run.validate(found, loader(4), verbose=False)
    assert record.perplexity_recovered == pytest.approx(logged["val_perplexity"], rel=1e-6)
    if precision == "bf16-mixed":
        assert perplexity(found.model, loader(4)) != pytest.approx(logged["val_perplexity"], rel=1e-6)


@pytest.mark.parametrize(("accelerator", "precision"), PRECISIONS)
def test_resumed_run_ends_as_the_uninterrupted(accelerator: str, precision: str, tmp_path: Any) -> None:
    options = {"accelerator": accelerator, "precision": precision, "max_epochs": 2, "max_steps": -1}
    path = tmp_path / "stopped.ckpt"
    whole = module()
    torch.manual_seed(0)
    trainer(tmp_path, half(3), **options).fit(whole, loader(12, shuffle=True))
    torch.manual_seed(0)
    with pytest.raises(Interrupted):
        trainer(tmp_path, half(3), Interrupting(path), **options).fit(module(), loader(12, shuffle=True))
    resumed = module()
    torch.manual_seed(1)
    trainer(tmp_path, half(3), **options).fit(resumed, loader(12, shuffle=True), ckpt_path=path)
    runs = [whole.state_dict(), resumed.state_dict()]
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
