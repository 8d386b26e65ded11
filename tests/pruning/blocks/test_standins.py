"""Stand-ins act for parts of a block, and leave nothing behind, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, assert_unchanged, calibration, leftovers
from torch import Tensor, nn

from fasp_lightning import FASPPruner, apply_plan
from fasp_lightning.pruning.blocks.standins import Fixed, Narrow, Recorder, Tap, first, skeleton, stand_ins, with_first
from fasp_lightning.structure.compact import GatherColumns, set_widths


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
    calls = []

    def boom(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) > 1:  # the first one is the rehearsal, before anything is cut
            raise Boom

    handle = model.get_submodule(f"model.layers.1.{path}").register_forward_pre_hook(boom)
    with pytest.raises(Boom):
        FASPPruner(BOTH).prune(model, calibration())
    handle.remove()
    assert leftovers(model) == []
    assert all(module.training for module in model.modules())
    assert {name: model.get_submodule(name) for name in modules} == modules
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


def test_a_stand_in_answers_for_the_original() -> None:
    linear = nn.Linear(3, 5)
    narrow = Narrow(linear)
    assert narrow.in_features == 3
    assert narrow.weight is linear.weight
    assert list(narrow.parameters()) == []  # they stay the model's
    assert narrow(torch.ones(2, 3)).shape == (2, 2)


def test_a_recorder_hands_on_its_inputs_and_returns_zeros() -> None:
    seen: list[Tensor] = []
    inputs = torch.randn(2, 4, 3)
    output = Recorder(nn.Linear(3, 5), 5, seen.append)(inputs)
    assert seen == [inputs]
    assert output.shape == (2, 4, 5)
    assert not output.any()


def test_a_recorder_of_a_cut_consumer_sees_the_columns_left() -> None:
    seen: list[Tensor] = []
    inputs = torch.randn(2, 6)
    block = nn.Sequential(nn.Linear(2, 5))
    set_widths(block, {"0": GatherColumns(torch.tensor([1, 4]))})
    with stand_ins(block, {"0": Recorder(block[0], 5, seen.append)}):
        block(inputs)
    assert torch.equal(seen[0], inputs[:, [1, 4]])


def test_a_fixed_output_is_given_once() -> None:
    fixed = Fixed(nn.Identity())
    fixed.value = torch.ones(2)
    assert torch.equal(fixed("anything"), torch.ones(2))
    assert fixed("anything") is None


@pytest.mark.parametrize("output", [torch.zeros(2), (torch.zeros(2),), (torch.zeros(2), torch.ones(3), None)])
def test_an_output_keeps_its_form_with_other_hidden_states(output: Any) -> None:
    value = torch.full((2,), 7.0)
    found = with_first(skeleton(output), value)
    assert first(found) is value
    assert isinstance(found, tuple) == isinstance(output, tuple)
    if isinstance(output, tuple):
        assert len(found) == len(output)
        assert all(other is None for other in found[1:])


def test_nested_stand_ins_are_put_back_in_order() -> None:
    outer = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    inside, linear = outer[0], outer[0][0]
    with stand_ins(outer, {"0.0": Narrow(linear), "0": Tap(inside)}):
        assert isinstance(outer[0], Tap)
        assert isinstance(inside[0], Narrow)
    assert outer[0] is inside
    assert inside[0] is linear
