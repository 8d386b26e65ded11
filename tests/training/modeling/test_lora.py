"""LoRA: attached it changes nothing, trains alone, is merged exactly, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_lightning import lora_parameters
from tiny_pruning import BOTH, FFN, pruned
from torch import nn

from fasp_lightning.structure.adapters import has_adapters, is_adapted
from fasp_lightning.structure.compact import width_hooks
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, base_parameters, merge_lora

FAMILIES = ["llama", "llama-gqa", "opt", "gpt2", "gpt_neox", "phi3", "bloom", "falcon"]
families = pytest.mark.parametrize("name", FAMILIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(), use_cache=False).logits


def with_values(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Attach an adapter, and fill its B matrices, which start at zero."""
    attach_lora(model, config or LoRAConfig(rank=3, alpha=6.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@families
def test_attaching_changes_no_logit(name: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    attach_lora(model, LoRAConfig(rank=3))
    assert torch.equal(logits(model), before)


@families
def test_every_linear_layer_of_the_blocks_and_no_other_gets_an_adapter(name: str) -> None:
    model = tiny_model(name)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    expected = {
        path
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and module not in heads
        and not isinstance(module, nn.Embedding)
    }
    attach_lora(model, LoRAConfig(rank=3))
    assert {path for path, module in model.named_modules() if is_adapted(module)} == expected


@families
def test_only_the_adapters_train(name: str) -> None:
    model = tiny_model(name)
    attach_lora(model, LoRAConfig(rank=3))
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if ".lora_A." in key or ".lora_B." in key}
    assert {id(value) for value in lora_parameters(model)} == {id(v) for v in model.parameters() if v.requires_grad}


@families
@pytest.mark.parametrize("cut", [False, True])
def test_merged_logits_equal_attached_logits(name: str, cut: bool) -> None:
    model = with_values(pruned(name, BOTH) if cut else tiny_model(name))
    attached = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), attached, atol=2e-5, rtol=1e-5)


@families
@pytest.mark.parametrize("cut", [False, True])
def test_merging_restores_modules_keys_and_training(name: str, cut: bool) -> None:
    model = pruned(name, BOTH) if cut else tiny_model(name)
    modules = dict(model.named_modules())
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    with_values(model)
    merge_lora(model)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert all(value.requires_grad == (value is not frozen) for value in model.parameters())
    assert not has_adapters(model)
    assert not {"peft_config", "fasp_frozen"} & set(vars(model))


def test_the_adapters_of_a_cut_value_pair_have_its_compact_widths() -> None:
    model = with_values(pruned("llama", BOTH))
    positions = {path: hook.positions.numel() for path, hook in width_hooks(model) if "v_proj" in path}
    assert len(positions) == 2
    for path, rows in positions.items():
        assert model.get_submodule(path).lora_B["default"].weight.shape[0] == rows


def test_a_cut_model_with_adapters_loads_its_own_state() -> None:
    model = with_values(pruned("llama", BOTH))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_16_bit_merge_rounds_once() -> None:
    model = with_values(tiny_model("llama", dtype=torch.bfloat16))
    layer = model.model.layers[0].mlp.down_proj
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    low, high = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = (layer.base_layer.weight.float() + layer.scaling["default"] * (high @ low)).bfloat16()
    merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)


def test_a_copy_is_merged_and_the_original_keeps_its_adapters() -> None:
    model = tiny_model("llama")
    frozen = "model.norm.weight"
    model.get_parameter(frozen).requires_grad_(False)
    with_values(model)
    twin = copy.deepcopy(model)
    merge_lora(twin)
    assert has_adapters(model)
    assert [key for key, value in twin.named_parameters() if not value.requires_grad] == [frozen]


def test_base_parameters_are_those_that_trained_before() -> None:
    model = tiny_model("opt")
    model.get_input_embeddings().weight.requires_grad_(False)
    expected = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    attach_lora(model, LoRAConfig())
    assert {id(parameter) for parameter in base_parameters(model)} == expected


def test_targets_are_names_or_ends_of_paths() -> None:
    model = tiny_model("gpt2")
    attach_lora(model, LoRAConfig(targets=["mlp.c_proj", "c_attn"]))
    found = {path for path, module in model.named_modules() if is_adapted(module)}
    assert found == {f"transformer.h.{i}.{name}" for i in range(2) for name in ("mlp.c_proj", "attn.c_attn")}


def test_a_target_of_a_cut_pair_is_named_as_before_the_cut() -> None:
    model = pruned("llama", BOTH)
    attach_lora(model, LoRAConfig(targets=("self_attn.v_proj",)))
    found = {path for path, module in model.named_modules() if is_adapted(module)}
    assert found == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"targets must be among .*q_proj.*down_proj, got 'query'"):
        attach_lora(model, LoRAConfig(targets=("q_proj", "query")))
    assert not has_adapters(model)


def test_attaching_twice_is_refused() -> None:
    model = with_values(pruned("llama", FFN))
    with pytest.raises(ValueError, match=r"no LoRA yet.*merge_lora"):
        attach_lora(model, LoRAConfig())


def test_merging_without_adapters_does_nothing() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    merge_lora(model)
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_config_survives_plain_data() -> None:
    config = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "v_proj"))
    assert LoRAConfig(**config.to_dict()) == config
    assert isinstance(config.to_dict()["targets"], list)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("alpha", 0.0), ("alpha", float("inf")), ("dropout", 1.0), ("targets", ()), ("targets", "q_proj")],
)
def test_a_field_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        LoRAConfig(**{field: value})
