"""Adapters by stock peft on a model with cut value dims: what trains is saved, loads, and merges to the same logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, calibration, pruned
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fasp_lightning import FASPPruner, load_pruned, save_pruned
from fasp_lightning.structure.compact import width_hooks

families = pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "llama-gqa"])
all_targets = pytest.mark.parametrize("targets", ["all-linear", None])
moments = pytest.mark.parametrize("before", [True, False], ids=["attached then cut", "cut then attached"])


def adapted(model: nn.Module, targets: str | None = "all-linear", **options: Any) -> Any:
    """A model with stock adapters that do something."""
    from peft import LoraConfig, get_peft_model

    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    result = get_peft_model(model, LoraConfig(r=3, target_modules=targets, fan_in_fan_out=transposed, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return result


def cut_and_adapted(family: str, before: bool, targets: str | None = "all-linear", **options: Any) -> Any:
    """Adapters attached to a dense model that is pruned then, or to a pruned model."""
    if not before:
        return adapted(pruned(family), targets, **options)
    result = adapted(tiny_model(family), targets, **options)
    FASPPruner(BOTH).prune(result.get_base_model(), calibration())
    return result


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(), use_cache=False).logits


@families
def test_a_cut_layer_is_the_plain_layer_of_its_weight(family: str) -> None:
    model = pruned(family)
    for path, _ in width_hooks(model):
        layer = model.get_submodule(path)
        assert type(layer) is (Conv1D if family == "gpt2" else nn.Linear)
        widths = (layer.nx, layer.nf) if family == "gpt2" else (layer.out_features, layer.in_features)
        assert layer.weight.shape == widths
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_model(family).named_parameters()]


@pytest.mark.sampled
@families
@all_targets
@moments
def test_every_trained_tensor_is_saved_and_loads_again(
    family: str, targets: str | None, before: bool, tmp_path: Path
) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    model = cut_and_adapted(family, before, targets)
    expected, base = logits(model), copy.deepcopy(model).unload()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(get_peft_model_state_dict(model)) > 0
    model.save_pretrained(tmp_path / "adapter")
    save_pruned(base, tmp_path / "base", form="compact")
    for fresh in (base, load_pruned(tmp_path / "base")):
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), expected)


@pytest.mark.sampled
@families
@all_targets
@moments
def test_merged_logits_are_those_with_adapters_and_can_be_saved(
    family: str, targets: str | None, before: bool, tmp_path: Path
) -> None:
    model = cut_and_adapted(family, before, targets)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    assert merged.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert save_pruned(merged, tmp_path / "merged").logit_difference < 1e-4
    FASPPruner(replace(BOTH, sparsity=0.3)).prune(merged, calibration())  # what peft has put back is cut again
    assert logits(merged).isfinite().all()


@moments
def test_switched_off_adapters_leave_the_base(before: bool) -> None:
    model = cut_and_adapted("llama-gqa", before)
    with model.disable_adapter():
        found = logits(model)
    assert torch.equal(found, logits(model.unload()))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_what_keeps_an_adapter_linear_in_its_factors_is_cut_along(options: dict[str, Any]) -> None:
    first, second = adapted(tiny_model("opt"), **options), adapted(tiny_model("opt"), **options)
    for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
        other.data.copy_(parameter.data)  # peft draws A
    FASPPruner(BOTH).prune(first.get_base_model(), calibration())
    merged = second.merge_and_unload()
    FASPPruner(BOTH).prune(merged, calibration())
    torch.testing.assert_close(logits(first), logits(merged), atol=1e-4, rtol=1e-4)


def other_adapters() -> dict[str, Any]:
    from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig

    paths = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return {
        "lora.variants.DoraLinearVariant": LoraConfig(target_modules=paths, use_dora=True),
        "lora.layer.ParamWrapper": LoraConfig(target_modules=[], target_parameters=["v_proj.weight"]),
        "adalora.layer.SVDLinear": AdaLoraConfig(target_modules=paths, total_step=10),
        "ia3.layer.Linear": IA3Config(target_modules=paths, feedforward_modules=["down_proj"]),
        "loha.layer.Linear": LoHaConfig(target_modules=paths, r=2),
        "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]),
        r"self_attn must be .*modules_to_save": LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"]),
    }


@pytest.mark.parametrize("got", other_adapters())
def test_other_adapters_are_refused_before_a_cut_and_right_after_it(got: str) -> None:
    from peft import get_peft_model

    config = other_adapters()[got]
    model = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match=f"{got}.*merge_and_unload"):
        FASPPruner(BOTH).prune(model.get_base_model(), calibration())
    base = pruned("llama")
    expected = logits(base)
    model = get_peft_model(base, config)
    if not got.startswith("lora.layer"):  # drawn at random
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)
