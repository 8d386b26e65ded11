"""``Trainer.fit`` on another device: events, resuming, recovery, and the random state of that device."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from runs import Interrupted, Interrupting, UserModule, half, loader, trainer
from tiny import random_tokens, tiny_model

from fasp_lightning import load_pruned
from fasp_lightning.training.trainer.random_state import isolated_random_state, random_state, restore_random_state


class SecondAccelerator(Accelerator):
    """The second device, as Lightning asks for one."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("second", index) for index in range(devices)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "second"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


class Noisy(UserModule):
    """Draws from its device's random state."""

    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch, index) * (1 + 0.1 * torch.rand((), device=self.device))


def there(second: torch.device) -> dict[str, Any]:
    """The Trainer's options for a run on it."""
    return {"accelerator": SecondAccelerator(), "strategy": SingleDeviceStrategy(second)}


@pytest.mark.parametrize("recovery", ["none", "full", "lora"])
def test_run_is_that_on_the_cpu(recovery: Any, tmp_path: Any, second: torch.device) -> None:
    callbacks = [half(2, recovery=recovery, validation_batches=2, export_to=str(tmp_path / name)) for name in "ab"]
    places: list[str] = []

    class Places(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            places.extend(sorted({one.device.type for one in pl_module.parameters()}))

    for callback, options in zip(callbacks, ({}, there(second)), strict=True):
        torch.manual_seed(0)
        module = UserModule(tiny_model("llama").train(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
        trainer(tmp_path, callback, Places(), max_steps=4, **options).fit(module, loader(), loader(4))
    assert places == ["cpu"] * 4 + ["second"] * 4
    (wanted,), (found,) = (callback.records for callback in callbacks)
    assert found.parameters == wanted.parameters
    for name in ("perplexity_before", "perplexity_pruned", "perplexity_recovered"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-3)
    logits = [load_pruned(tmp_path / name)(random_tokens()).logits for name in "ab"]
    torch.testing.assert_close(*logits, atol=1e-2, rtol=1e-2)


@pytest.mark.sampled
@pytest.mark.parametrize("recovery", ["none", "lora"])
@pytest.mark.parametrize("step", [1, 5], ids=["event before the stop", "event after it"])
def test_resumed_run_ends_as_the_uninterrupted(step: int, recovery: Any, tmp_path: Any, second: torch.device) -> None:
    """The module draws from the device's random state, which has to come back."""
    path = tmp_path / "stopped.ckpt"

    def run(seed: int, *others: L.Callback, **given: Any) -> UserModule:
        torch.manual_seed(seed)
        module = Noisy(tiny_model("llama").train())
        options = {"max_epochs": 2, "max_steps": -1, **there(second)}
        trainer(tmp_path, half(step, recovery=recovery), *others, **options).fit(module, loader(6), **given)
        return module

    whole = run(0)
    with pytest.raises(Interrupted):
        run(0, Interrupting(path))
    resumed = run(1, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value.cpu(), resumed.state_dict()[name].cpu()), name


def test_random_state_of_the_device_goes_with_the_process(second: torch.device) -> None:
    state = random_state()
    with isolated_random_state():
        expected = torch.rand(3, device=second)
        torch.manual_seed(7)
    assert torch.equal(torch.rand(3, device=second), expected)
    restore_random_state(state)
    assert torch.equal(torch.rand(3, device=second), expected)
