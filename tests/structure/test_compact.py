"""Compact layers are the modules that they were; hooks on them compute what the masked layer would."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fasp_lightning.structure.compact import (
    GatherColumns,
    ScatterRows,
    replace_module,
    set_features,
    set_widths,
    width_hooks,
)

INDEX = torch.tensor([0, 3, 4])


class Block(nn.Module):
    """Its layers stand two levels down, below a module that nobody calls."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"v_proj": nn.Linear(5, len(INDEX), bias=bias), "o_proj": nn.Linear(len(INDEX), 5)})
        self.plain = copy.deepcopy(self.attn)
        set_widths(self, {"attn.v_proj": ScatterRows(INDEX, 7), "attn.o_proj": GatherColumns(INDEX)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = self.attn["v_proj"](inputs)
        assert wide.shape[-1] == 7
        return self.attn["o_proj"](wide)

    def expected(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.plain["o_proj"](self.plain["v_proj"](inputs))


class Around(nn.Module):
    """What an adapter library puts around a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.base(inputs)
        assert inputs.shape[-1] == self.in_features
        assert output.shape[-1] == self.out_features
        return output


@pytest.mark.parametrize("bias", [True, False])
def test_scattered_rows_are_zero_where_they_were_cut(bias: bool) -> None:
    block, inputs = Block(bias), torch.randn(2, 6, 5)
    full = nn.Linear(5, 7, bias=bias)
    with torch.no_grad():
        for parameter, compact in zip(full.parameters(), block.attn["v_proj"].parameters(), strict=True):
            parameter.zero_()
            parameter[INDEX] = compact
    torch.testing.assert_close(block.attn["v_proj"](inputs), full(inputs))


@pytest.mark.parametrize("named", [False, True])
def test_gathered_columns_are_those_of_the_full_input(named: bool) -> None:
    module, inputs = Block().attn["o_proj"], torch.randn(2, 6, 7)
    full = nn.Linear(7, 5)
    with torch.no_grad():
        full.weight.zero_()
        full.weight[:, INDEX] = module.weight
        full.bias.copy_(module.bias)
    torch.testing.assert_close(module(input=inputs) if named else module(inputs), full(inputs))


def test_other_hooks_of_a_consumer_see_its_own_columns() -> None:
    block, seen = Block(), []
    late = GatherColumns(INDEX)
    block.attn["o_proj"].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    set_widths(block, {"attn.o_proj": late})  # again, behind the other hook
    block(torch.randn(2, 5))
    assert seen == [len(INDEX)]


def test_gradients_reach_the_compact_weights_and_the_input() -> None:
    model, inputs = Block(), torch.randn(3, 5, requires_grad=True)
    model(inputs).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is not None for parameter in model.attn.parameters())


def test_names_are_keys() -> None:
    model = Block()
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_compact_state_meets_a_stock_linear_with_a_size_mismatch() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(5, 7).load_state_dict(Block().attn["v_proj"].state_dict())


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copied, pickled])
@pytest.mark.parametrize("moved", [False, True])
def test_a_copy_computes_the_same_and_is_independent(twin_of: Any, moved: bool) -> None:
    model, inputs = Block(), torch.randn(3, 5)
    if moved:  # by a library, and not followed yet
        replace_module(model, "attn.v_proj", Around(model.attn["v_proj"]))
    twin = twin_of(model)
    expected = model.expected(inputs)
    set_widths(model, {path: None for path, _ in list(width_hooks(model))} | {"attn.v_proj": None})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(inputs), expected)
    assert torch.equal(twin(inputs), expected)


def test_hooks_follow_the_path() -> None:
    model, inputs = Block(), torch.randn(3, 5)
    expected, layers = model.expected(inputs), dict(model.attn)
    for wrap in (Around, lambda layer: layer, copy.deepcopy, lambda layer: Around(Around(layer))):
        for name, layer in layers.items():
            model.attn[name] = wrap(layer)
        assert torch.equal(model(inputs), expected)
    for name, layer in layers.items():
        model.attn[name] = layer
    assert torch.equal(model(inputs), expected)
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers.values()] == [1, 1]


def test_hooks_that_a_library_hands_on_work_once() -> None:
    """Dynamic quantisation puts another module in a layer's place, and registers the layer's hooks on it."""
    model, inputs = Block(), torch.randn(3, 5)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantised.attn["v_proj"]) is not nn.Linear
    torch.testing.assert_close(quantised(inputs), model.expected(inputs), atol=0.1, rtol=0)


def test_without_hooks_a_layer_has_its_own_widths() -> None:
    model = Block()
    set_widths(model, {"attn.v_proj": None})
    assert model.attn["v_proj"](torch.randn(2, 5)).shape == (2, 3)
    assert not model.attn["v_proj"]._forward_hooks
    assert [path for path, _ in width_hooks(nn.ModuleList([model]))] == ["0.attn.o_proj"]


def test_positions_survive_a_stay_on_the_meta_device() -> None:
    model, inputs = Block(), torch.randn(3, 5)
    state, expected = model.state_dict(), model.expected(inputs)
    model.to("meta")
    assert model(inputs.to("meta")).is_meta
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(inputs), expected)


def test_a_model_cut_and_run_in_inference_mode_trains_afterwards() -> None:
    with torch.inference_mode():
        hooks = {"attn.v_proj": ScatterRows(INDEX.clone(), 7), "attn.o_proj": GatherColumns(INDEX.clone())}
        model = Block()
        set_widths(model, hooks)
        model(torch.randn(2, 5))
    assert not any(hook.positions.is_inference() for hook in hooks.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model, inputs = Block(), torch.randn(3, 5, requires_grad=True)
    model.attn["v_proj"] = Around(model.attn["v_proj"])  # followed in the first call
    checkpoint(model, inputs, use_reentrant=reentrant).sum().backward()
    found = inputs.grad
    inputs.grad = None
    model(inputs).sum().backward()
    assert torch.equal(found, inputs.grad)


def test_a_block_compiles_as_one_graph_for_all_blocks_of_its_widths() -> None:
    counter = CompileCounter()
    blocks, inputs = [Block(), Block()], torch.randn(3, 5)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
        assert torch.equal(block(inputs), block.expected(inputs))
    assert counter.frame_count == 1
    set_widths(blocks[0], {"attn.v_proj": ScatterRows(INDEX, 7), "attn.o_proj": GatherColumns(INDEX + 1)})
    assert not torch.equal(blocks[0](inputs), blocks[0].expected(inputs))  # other positions count at once


def test_module_is_replaced_at_its_path() -> None:
    model, linear = Block(), nn.Linear(7, 5)
    replace_module(model, "attn.o_proj", linear)
    assert model.attn["o_proj"] is linear
    blocks = nn.ModuleList([nn.Linear(1, 1)])
    replace_module(blocks, "0", linear)
    assert blocks[0] is linear


def test_width_attributes_follow_the_weight() -> None:
    linear, conv = nn.Linear(4, 6), Conv1D(6, 4)
    linear.weight.data = linear.weight.data[:5, :3]
    conv.weight.data = conv.weight.data[:3, :5]
    set_features(linear, *linear.weight.shape[::-1])
    set_features(conv, *conv.weight.shape)
    assert (linear.in_features, linear.out_features) == (conv.nx, conv.nf) == (3, 5)
