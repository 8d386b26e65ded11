"""Spec and model become modules, and what does not fit is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import consumer_columns
from tiny import FFN, HEADS, HIDDEN, TINY, random_tokens, tiny_model
from torch import nn

from fasp_lightning import ArchitectureSpec, CoupledPair, spec_for
from fasp_lightning.structure.compact import width_hooks
from fasp_lightning.structure.resolve import ResolvedPair, linear_parameters, parameter_count, resolve

DOWN = CoupledPair("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), "ffn")


def pair_of(model: nn.Module, kind: str, block: int = 0) -> ResolvedPair:
    return next(pair for pair in resolve(model, spec_for(model))[block] if pair.spec.kind == kind)


def some_units(pair: ResolvedPair) -> torch.Tensor:
    """All but every third unit; the same number in each group."""
    units = torch.arange(pair.layout.width)
    return units[units % pair.layout.size % 3 != 1]


GEOMETRY = {  # groups, repeats and head size of the value pair
    "opt": (4, 1, 8),
    "llama": (4, 1, 8),
    "llama-gqa": (2, 2, 8),
    "gemma": (1, 4, 16),
    "qwen3": (2, 2, 16),
    "phi3": (2, 2, 8),
    "gpt2": (4, 1, 8),
    "gpt_neox": (4, 1, 8),
    "bloom": (4, 1, 8),
    "falcon": (2, 2, 8),
    "falcon-multi-query": (1, 4, 8),
    "falcon-alibi": (4, 1, 8),
}


@pytest.mark.parametrize("family", GEOMETRY)
def test_heads_follow_from_the_shapes(family: str) -> None:
    layout = pair_of(tiny_model(family), "value").layout
    assert (layout.groups, layout.repeats, layout.size) == GEOMETRY[family]


@pytest.mark.parametrize("family", TINY)
def test_every_block_is_resolved_in_the_order_of_the_forward_pass(family: str) -> None:
    model = tiny_model(family)
    blocks = resolve(model, spec_for(model))
    assert len(blocks) == model.config.num_hidden_layers
    for index, pairs in enumerate(blocks):
        assert [pair.spec.kind for pair in pairs] == ["value", "ffn"]
        assert {pair.name for pair in pairs} == {f"{spec_for(model).layers}.{index}"}
        assert all(pair.kept.tolist() == list(range(pair.layout.width)) for pair in pairs)
    assert blocks[0][1].layout.width == (4 * HIDDEN if family == "bloom" else FFN)


@pytest.mark.parametrize("kind", ["value", "ffn"])
@pytest.mark.parametrize("family", TINY)
def test_cut_removes_the_cost_of_each_unit(family: str, kind: str) -> None:
    model = tiny_model(family)
    pair, before, linear = pair_of(model, kind), parameter_count(model), linear_parameters(model, spec_for(model))
    cost, width = pair.unit_cost, pair.layout.width
    kept = some_units(pair)
    pair.cut(kept)
    assert before - parameter_count(model) == (width - kept.numel()) * cost
    assert linear - linear_parameters(model, spec_for(model)) == (width - kept.numel()) * cost
    assert pair.unit_cost == cost
    assert pair.kept.tolist() == kept.tolist()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["value", "ffn"])
@pytest.mark.parametrize("family", TINY)
def test_cut_twice_is_cut_once(family: str, kind: str) -> None:
    twice, once = tiny_model(family), tiny_model(family)
    kept = some_units(pair_of(once, kind))
    pair = pair_of(twice, kind)
    pair.cut(torch.cat([kept, torch.tensor([1])]).unique())  # one unit more: groups need not be even here
    pair.cut(kept)
    pair_of(once, kind).cut(kept)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in twice.state_dict().items())
    with torch.no_grad():
        assert torch.equal(twice(random_tokens()).logits, once(random_tokens()).logits)


@pytest.mark.parametrize("family", TINY)
def test_width_attributes_agree_with_the_weights_after_a_cut(family: str) -> None:
    model = tiny_model(family)
    spec = spec_for(model)
    for pair in resolve(model, spec)[0]:
        pair.cut(some_units(pair))
        for linear in (pair.consumer, *pair.producers):
            outputs, inputs = linear.weight.shape[::-1] if spec.transposed else linear.weight.shape
            names = ("nf", "nx") if spec.transposed else ("out_features", "in_features")
            assert (outputs, inputs) == tuple(getattr(linear, name) for name in names)
            assert linear.bias is None or linear.bias.shape == (outputs,)


def test_cut_keeps_parameters_and_gradients() -> None:
    model = tiny_model("llama")
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    model(random_tokens()).logits.sum().backward()
    pair = pair_of(model, "ffn")
    gradient = pair.consumer.weight.grad.clone()
    kept = some_units(pair)
    pair.cut(kept)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert torch.equal(pair.consumer.weight.grad, gradient[:, kept])


def test_only_value_pairs_have_width_hooks_and_only_one_a_layer() -> None:
    model = tiny_model("llama")
    for pair in resolve(model, spec_for(model))[0]:
        pair.cut(some_units(pair))
        pair.cut(some_units(pair)[:-1])
    first = "model.layers.0"
    attention, mlp = model.get_submodule(first).self_attn, model.get_submodule(first).mlp
    assert [path for path, _ in width_hooks(model)] == [f"{first}.self_attn.o_proj", f"{first}.self_attn.v_proj"]
    assert (len(attention.o_proj._forward_pre_hooks), len(attention.v_proj._forward_hooks)) == (1, 1)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in mlp.modules())


@pytest.mark.parametrize("family", TINY)
def test_a_cut_keeps_modules_and_names(family: str) -> None:
    model = tiny_model(family)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for pair in resolve(model, spec_for(model))[0]:
        pair.cut(some_units(pair))
    assert dict(model.named_modules()) == modules
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert parameters.keys() <= model.state_dict().keys()


def test_keeping_everything_changes_nothing() -> None:
    model = tiny_model("llama")
    pair = pair_of(model, "value")
    pair.cut(torch.arange(pair.layout.width))
    assert type(pair.block.self_attn.o_proj) is nn.Linear


@pytest.mark.parametrize("kind", ["value", "ffn"])
@pytest.mark.parametrize("family", TINY)
def test_zero_filled_tensors_load_into_a_stock_model(family: str, kind: str) -> None:
    model, stock = tiny_model(family), tiny_model(family)
    pair = pair_of(model, kind)
    pair.cut(some_units(pair))
    tensors = pair.zero_filled(torch.arange(pair.layout.width))
    missing = pair_of(stock, kind).block.load_state_dict(tensors, strict=False).missing_keys
    assert not set(tensors) & set(missing)
    with torch.no_grad():
        torch.testing.assert_close(stock(random_tokens()).logits, model(random_tokens()).logits, atol=1e-4, rtol=0)
    columns = consumer_columns(pair.layout, pair.kept.tolist())
    weight = tensors[f"{pair.spec.consumer}.weight"]
    assert (weight.T if pair.transposed else weight).abs().sum(0).nonzero().flatten().tolist() == columns


def test_earlier_cuts_are_given_in_original_numbering() -> None:
    model = tiny_model("llama-gqa")
    pairs = resolve(model, spec_for(model))
    cuts = []
    for block in pairs:
        for pair in block:
            pair.cut(some_units(pair))
        cuts.append({pair.spec.consumer: (pair.layout, pair.kept) for pair in block})
    again = resolve(model, spec_for(model), cuts)
    for before, after in zip(pairs, again, strict=True):
        for one, other in zip(before, after, strict=True):
            assert one.layout == other.layout
            assert torch.equal(one.kept, other.kept)


def edit_linear(path: str, **changes: Any) -> Any:
    def edit(model: nn.Module) -> None:
        linear = model.get_submodule(f"model.layers.1.{path}")
        outputs, inputs = changes.get("outputs", linear.out_features), changes.get("inputs", linear.in_features)
        linear.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=changes.get("dtype")), requires_grad=False)

    return edit


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (edit_linear("mlp.up_proj", outputs=47), r"mlp\.up_proj must have 48 rows to feed model\.layers\.1\.mlp\.down"),
        (edit_linear("mlp.down_proj", inputs=40), r"gate_proj must have 40 rows to feed model\.layers\.1\.mlp\.down"),
        (edit_linear("self_attn.o_proj", inputs=30), r"layers\.1\.self_attn\.o_proj: .* must divide its 30 columns"),
        (edit_linear("self_attn.v_proj", outputs=24), r"layers\.1\.self_attn\.o_proj: 4 query heads .* got 3"),
        (
            edit_linear("self_attn.v_proj", outputs=20),
            r"layers\.1\.self_attn\.o_proj: 4 query heads .* 20 producer",
        ),
        (edit_linear("mlp.up_proj", dtype=torch.int8), r"layers\.1\.mlp\.up_proj must be .* floating-point .*int8"),
    ],
    ids=["row-short", "column-short", "heads", "groups", "part-of-a-head", "quantised"],
)
def test_shape_that_does_not_fit_names_the_layer(edit: Any, error: str) -> None:
    model = tiny_model("llama")
    edit(model)
    with pytest.raises(ValueError, match=error):
        resolve(model, spec_for(model))


@pytest.mark.parametrize("rows", [3 * HIDDEN + 8, 3 * HIDDEN - 8, HIDDEN])
def test_fused_producer_of_odd_height_is_refused(rows: int) -> None:
    model = tiny_model("gpt_neox")
    model.gpt_neox.layers[0].attention.query_key_value = nn.Linear(HIDDEN, rows)
    with pytest.raises(ValueError, match=rf"{HEADS} query heads of size 8 .* {rows} producer rows"):
        resolve(model, spec_for(model))


def test_wrong_path_names_block_and_module() -> None:
    spec = ArchitectureSpec("model.layers", (replace(DOWN, producers=("mlp.fc1",)),))
    with pytest.raises(ValueError, match=r"model\.layers\.0 must have a module 'mlp\.fc1'; correct the row"):
        resolve(tiny_model("llama"), spec)


@pytest.mark.parametrize("layers", ["model.blocks", "model.norm", ""])
def test_layers_that_are_no_module_list_are_refused(layers: str) -> None:
    with pytest.raises(ValueError, match=rf"layers must be .* ModuleList in LlamaForCausalLM, got '{layers}'"):
        resolve(tiny_model("llama"), ArchitectureSpec(layers, (DOWN,)))


def test_heads_that_do_not_divide_the_columns_are_refused() -> None:
    model = tiny_model("llama")
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match=r"num_attention_heads must divide its 32 columns, got 5"):
        resolve(model, spec_for(model))


def test_cut_that_the_model_does_not_have_is_refused() -> None:
    model = tiny_model("llama")
    layout = pair_of(model, "ffn").layout
    cuts = [{"mlp.down_proj": (layout, torch.arange(40))}, {}]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj must have a width of 40 .* got 48"):
        resolve(model, spec_for(model), cuts)


def test_block_that_lacks_a_pair_is_left_without_it() -> None:
    model = tiny_model("llama")
    spec = spec_for(model)
    model.model.layers[0].mlp = nn.Identity()
    model.model.layers[1].self_attn.v_proj = None
    blocks = resolve(model, spec)
    assert [[pair.spec.kind for pair in block] for block in blocks] == [["value"], ["ffn"]]
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"must have a module 'mlp.down_proj'"):  # that no block has
        resolve(model, spec)
