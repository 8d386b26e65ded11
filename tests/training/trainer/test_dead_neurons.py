"""Dead-neuron law: to train with units that are dead from the start is to train a model they are cut from mid-fit.

A lost optimizer state, a lost gradient, a schedule that starts again or a parameter outside the optimizer would each
show as a difference of the losses.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from runs import UserModule, half, half_dead, loader, trainer

from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
OPTIMIZERS = {
    "adamw": ADAMW,
    "adamw-fused": partial(ADAMW, fused=True),
    "adamw-foreach": partial(ADAMW, foreach=True),
    "adamw-amsgrad": partial(ADAMW, amsgrad=True),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
    "nadam": partial(torch.optim.NAdam, lr=1e-3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


def assert_law(
    tmp_path: Any, prepare: Any = None, scheduler: Any = None, optimizer: Any = ADAMW, **options: Any
) -> None:
    """Run twice, without and with the cut, and compare every loss."""
    runs = []
    for callbacks in ((), (half(step=4),)):
        torch.manual_seed(0)
        module = UserModule(half_dead(), optimizer, scheduler)
        if prepare is not None:
            prepare(module.lm)
        trainer(tmp_path, *callbacks, **options).fit(module, loader())
        runs.append(module)
    dense, cut = runs
    down = cut.lm.get_submodule("model.layers.0.mlp.down_proj")
    assert down.weight.shape == (32, 24)
    assert len(dense.losses) == len(cut.losses) >= 10
    torch.testing.assert_close(torch.tensor(cut.losses), torch.tensor(dense.losses), atol=1e-6, rtol=0)
    assert len(set(dense.losses)) > 5  # it did train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows_the_cut(name: str, tmp_path: Any) -> None:
    assert_law(tmp_path, optimizer=OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_option_goes_on_across_the_cut(name: str, tmp_path: Any) -> None:
    assert_law(tmp_path, **OPTIONS[name])


def test_schedule_of_the_learning_rate_goes_on(tmp_path: Any) -> None:
    assert_law(tmp_path, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_goes_on(reentrant: bool, tmp_path: Any) -> None:
    assert_law(tmp_path, lambda model: model.gradient_checkpointing_enable({"use_reentrant": reentrant}))


def test_compiled_model_is_compiled_anew(tmp_path: Any) -> None:
    assert_law(tmp_path, lambda model: model.compile(backend="aot_eager"))


def test_adapters_follow_the_cut(tmp_path: Any) -> None:
    assert_law(tmp_path, lambda model: attach_lora(model, LoRAConfig(rank=3)))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
def test_law_holds_on_the_accelerator(precision: str, tmp_path: Any) -> None:
    assert_law(tmp_path, accelerator="gpu", precision=precision)


def test_no_parameter_leaves_the_optimizer(tmp_path: Any) -> None:
    module = UserModule(half_dead())
    run = trainer(tmp_path, half(step=2), max_steps=4)
    run.fit(module, loader())
    (optimizer,) = run.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(one) for one in held} == {id(one) for one in module.parameters()}
    for parameter in held:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"] == 4
