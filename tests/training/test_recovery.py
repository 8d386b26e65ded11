"""Which parameters train before the first event, and which after it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from runs import UserModule, half, loader, trainer
from tiny import tiny_model

from fasp_lightning.structure.adapters import has_adapters, is_adapter_parameter
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora
from fasp_lightning.training.recovery import MODES, Recovery, trained_names


def norms_alone(adapters: bool = False) -> Any:
    """A tiny llama whose user trains its norms, and what trains then."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    own = trained_names(model)
    if adapters:
        attach_lora(model, LoRAConfig(rank=2))
    return model, own


@pytest.mark.parametrize("mode", MODES)
def test_optimizers_are_given_all_that_will_ever_train(mode: str) -> None:
    model, own = norms_alone(adapters=mode == "lora")
    recovery = Recovery(mode, own)
    recovery.prepare(model)
    given = {name for name, one in model.named_parameters() if one.requires_grad}
    for pruned in (False, True):
        recovery.apply(model, pruned)
        assert {name for name, one in model.named_parameters() if one.requires_grad} <= given


@pytest.mark.parametrize("pruned", [False, True])
def test_adapters_alone_train_after_the_first_event(pruned: bool) -> None:
    model, own = norms_alone(adapters=True)
    Recovery("lora", own).apply(model, pruned)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (is_adapter_parameter(name) if pruned else "norm" in name)


def test_blocks_alone_train_after_the_first_event() -> None:
    model, own = norms_alone()
    Recovery("blocks", own).apply(model, pruned=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("model.layers."), name


def test_parameter_that_no_longer_trains_has_no_gradient() -> None:
    model, own = norms_alone(adapters=True)
    recovery = Recovery("lora", own)
    recovery.prepare(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    recovery.apply(model, pruned=True)
    assert all((one.grad is not None) == one.requires_grad for one in model.parameters())


def test_optimizer_must_hold_what_recovery_trains() -> None:
    model, own = norms_alone()
    recovery = Recovery("full", own)
    recovery.check(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    norms = [one for name, one in model.named_parameters() if "norm" in name]
    with pytest.raises(ValueError, match=r"recovery='full' needs its parameters in the optimizer, which lacks \d+"):
        recovery.check(model, [torch.optim.SGD(norms, lr=0.1)])
    Recovery("none", own).check(model, [torch.optim.SGD(norms, lr=0.1)])


@pytest.mark.parametrize("recovery", ["none", "full", "lora"])
def test_recovery_decides_what_trains(recovery: str, tmp_path: Any) -> None:
    class Trained(L.Callback):
        def __init__(self) -> None:
            self.steps: list[set[str]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.before = {name: value.clone() for name, value in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            moved = {name for name, value in pl_module.named_parameters() if not torch.equal(value, self.before[name])}
            self.steps.append({"lora" if "lora_" in name else "head" if "norm" in name else "base" for name in moved})

    model = tiny_model("llama").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)  # the user trains norms alone
    trained = Trained()
    module = UserModule(model)
    callback = half(2, recovery=recovery, lora=LoRAConfig(rank=2))
    trainer(tmp_path, callback, trained, max_steps=5).fit(module, loader())
    after = {"none": {"head"}, "full": {"head", "base"}, "lora": {"lora"}}[recovery]
    # B starts at zero, so that A has no gradient in the first step
    assert trained.steps == [{"head"}, {"head"}, after, after, after]
    assert not has_adapters(module.lm)
    assert {name for name, one in module.lm.named_parameters() if one.requires_grad} == {
        name for name, _ in module.lm.named_parameters() if recovery == "full" or "norm" in name
    }


@pytest.mark.parametrize("resumed", [False, True])
def test_optimizer_forgets_what_no_longer_trains(resumed: bool, tmp_path: Any) -> None:
    """AdamW's two moments of the whole model would stay in memory for the rest of the run, and in its checkpoints."""

    class Held(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            trained = {one for one in pl_module.parameters() if one.requires_grad}
            assert set(optimizer.state) == trained
            held.append(len(trained))
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    held: list[int] = []
    for steps in (5, 7) if resumed else (5,):
        module = UserModule(tiny_model("llama").train())
        run = trainer(tmp_path, half(2, recovery="lora"), Held(), max_steps=steps)
        run.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt" if steps == 7 else None)
    assert held[1] != held[2] == held[-1]


def test_run_after_one_that_an_error_ended_has_its_own_adapters(tmp_path: Any) -> None:
    class Broken(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise KeyError("broken")

    module, callback = UserModule(tiny_model("llama").train()), half(2, recovery="lora")
    with pytest.raises(KeyError):
        trainer(tmp_path, callback, Broken()).fit(module, loader())
    trainer(tmp_path, callback, max_steps=4).fit(module, loader())
    assert not has_adapters(module.lm)
    assert all(one.requires_grad for one in module.lm.parameters())
