"""How the engine goes about it: passes, stand-ins, and what is put back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, assert_same, assert_unchanged, basic, calibration, leftovers, pruned
from torch import Tensor, nn

from fasp_lightning import FASPPruner, apply_plan, spec_for
from fasp_lightning.structure.compact import inner
from fasp_lightning.structure.resolve import find_blocks


@pytest.mark.sampled
@pytest.mark.parametrize("attention", ["value_dims", "none"])
@pytest.mark.parametrize("family", TINY)
def test_every_projection_runs_once_a_calibration_batch(family: str, attention: str) -> None:
    model, calls = tiny_model(family), Counter()
    spec, batches = spec_for(model), calibration()
    blocks = find_blocks(model, spec)
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
                module.register_forward_pre_hook(lambda m, args, key=(index, name): calls.update([key]))
    FASPPruner(basic(0.2, attention=attention)).prune(model, batches)
    # one call more in block 0: the form of a block's output is learned by running it once
    runs = {key: count - (key[0] == 0) for key, count in calls.items()}
    assert len(runs) == len(blocks) * len({name for _, name in runs})
    assert runs == dict.fromkeys(runs, len(batches))


def test_batches_are_read_once() -> None:
    batches = iter(calibration())
    assert_same(pruned(batches=batches), pruned())
    assert next(batches, None) is None


def test_nothing_temporary_is_left_after_pruning() -> None:
    model = tiny_model("gemma3")
    modes = {name: name.endswith("mlp") for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        module.training = modes[name]
    FASPPruner(BOTH).prune(model, calibration())
    assert leftovers(model) == []
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_run_time_modules_take_over_the_training_flag(training: bool) -> None:
    model = tiny_model("llama").train(training)
    FASPPruner(BOTH).prune(model, calibration())
    assert {module.training for module in model.modules()} == {training}


class Boom(Exception):
    """Raised by a hook in the midst of a pruning."""


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.act_fn"])
def test_stand_ins_are_gone_after_an_exception(path: str) -> None:
    model = tiny_model("llama").train()
    modules = {name: module for name, module in model.named_modules() if "layers.1" in name}

    def boom(module: nn.Module, args: Any) -> None:
        raise Boom

    handle = model.get_submodule(f"model.layers.1.{path}").register_forward_pre_hook(boom)
    with pytest.raises(Boom):
        FASPPruner(BOTH).prune(model, calibration())
    handle.remove()
    assert leftovers(model) == []
    assert all(module.training for module in model.modules())
    assert {name: inner(model.get_submodule(name)) for name in modules} == modules
    assert set(model.fasp_plan.blocks[0]) == {"self_attn.o_proj", "mlp.down_proj"}
    fresh = apply_plan(tiny_model("llama"), model.fasp_plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    with torch.no_grad():
        assert model.eval()(random_tokens()).logits.isfinite().all()


def test_stand_ins_are_gone_after_a_failing_batch() -> None:
    def batches() -> Any:
        yield random_tokens()
        raise Boom

    model = tiny_model("llama")
    with pytest.raises(Boom):
        FASPPruner(BOTH).prune(model, batches())
    assert leftovers(model) == []
    assert_unchanged(model)


@pytest.mark.parametrize(
    ("broken", "named"),
    [("self_attn.v_proj", "model.layers.1.self_attn.o_proj"), ("mlp.up_proj", "model.layers.1.mlp.down_proj")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite_names_the_layer(broken: str, named: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{broken}").weight[0, 0] = value
    with pytest.raises(ValueError, match=rf"activations must be finite.*{named}"):
        FASPPruner(BOTH).prune(model, calibration())
    assert leftovers(model) == []
