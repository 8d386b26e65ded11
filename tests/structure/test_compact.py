"""Run-time modules compute what the masked linear would, and hide from the state dict."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fasp_lightning.structure.compact import GatherColumns, ScatterRows, inner, replace_module, set_features

INDEX = torch.tensor([0, 3, 4])


def scatter(bias: bool = True) -> ScatterRows:
    return ScatterRows(nn.Linear(5, len(INDEX), bias=bias), INDEX, 7)


def gather() -> GatherColumns:
    return GatherColumns(nn.Linear(len(INDEX), 5), INDEX)


class Attention(nn.Module):
    """Nested as in a model: the run-time modules stand two levels down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.attn = nn.ModuleDict({"v_proj": scatter(), "o_proj": GatherColumns(nn.Linear(3, 5), INDEX)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.attn["o_proj"](self.attn["v_proj"](self.norm(inputs)))


@pytest.mark.parametrize("bias", [True, False])
def test_scattered_rows_are_zero_where_they_were_cut(bias: bool) -> None:
    module, inputs = scatter(bias), torch.randn(2, 6, 5)
    full = nn.Linear(5, 7, bias=bias)
    with torch.no_grad():
        for parameter, compact in zip(full.parameters(), module.parameters(), strict=True):
            parameter.zero_()
            parameter[INDEX] = compact
    torch.testing.assert_close(module(inputs), full(inputs))


def test_gathered_columns_are_those_of_the_full_input() -> None:
    module, inputs = gather(), torch.randn(2, 6, 7)
    full = nn.Linear(7, 5)
    with torch.no_grad():
        full.weight.zero_()
        full.weight[:, INDEX] = module.linear.weight
        full.bias.copy_(module.linear.bias)
    torch.testing.assert_close(module(inputs), full(inputs))
    assert torch.equal(module.gather(inputs), inputs[..., INDEX])


def test_gradients_reach_the_compact_weights_and_the_input() -> None:
    model, inputs = Attention(), torch.randn(3, 5, requires_grad=True)
    model(inputs).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("make", [scatter, gather])
def test_keys_are_those_of_the_linear_inside(make) -> None:
    module = make()
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.state_dict()["weight"], module.linear.weight)


def test_nested_keys_are_those_of_the_stock_model() -> None:
    keys = {"norm.weight", "norm.bias", *(f"attn.{n}.{p}" for n in ("v_proj", "o_proj") for p in ("weight", "bias"))}
    assert set(Attention().state_dict()) == keys


@pytest.mark.parametrize("assign", [True, False])
def test_nested_state_saves_and_loads(assign: bool) -> None:
    saved, other, inputs = Attention(), Attention(), torch.randn(3, 5)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    result = other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(other(inputs), saved(inputs))


def test_loading_leaves_the_given_state_alone() -> None:
    state = Attention().state_dict()
    before = dict(state)
    Attention().load_state_dict(state)
    assert list(state) == list(before)


def test_missing_and_unknown_keys_are_errors() -> None:
    state = Attention().state_dict()
    state["attn.v_proj.scale"] = state.pop("attn.v_proj.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*v_proj.*weight.*Unexpected.*v_proj.*scale"):
        Attention().load_state_dict(state)


def test_compact_state_meets_a_stock_linear_with_a_size_mismatch() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(5, 7).load_state_dict(scatter().state_dict())


def test_copy_is_transparent_and_independent() -> None:
    model, inputs = Attention(), torch.randn(3, 5)
    copied = copy.deepcopy(model)
    expected = model(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(copied(inputs), expected)
    model.load_state_dict(copied.state_dict())
    assert torch.equal(model(inputs), expected)


def test_index_moves_with_the_module() -> None:
    module = scatter().to("meta")
    assert module.positions.device.type == module.linear.weight.device.type == "meta"
    assert scatter().half().positions.dtype == torch.long


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_is_that_of_the_linear(training: bool) -> None:
    assert ScatterRows(nn.Linear(5, 3).train(training), INDEX, 7).training is training


def test_inner_is_the_linear_wrapped_or_not() -> None:
    linear = nn.Linear(3, 5)
    assert inner(linear) is inner(GatherColumns(linear, INDEX)) is linear


def test_module_is_replaced_at_its_path() -> None:
    model, linear = Attention(), nn.Linear(7, 5)
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
