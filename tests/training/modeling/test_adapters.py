"""To prune a model with adapters is to prune the model they would be merged into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_lightning import lora_parameters
from tiny_pruning import basic
from torch import nn

from fasp_lightning import FASPPruner, PruningConfig, save_pruned
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.plan import conform, plan_of
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora

BATCHES = [random_tokens(2, 40, seed=seed) for seed in range(3)]
SETTINGS = {
    "original": basic(0.2, attention="value_dims"),
    "zero": PruningConfig.paper(0.2, refit_bias=True),
    "principal": basic(0.2, attention="value_dims", value_basis="principal"),
}


@torch.no_grad()
def adapted(family: str) -> Any:
    """A tiny model in float64 with adapters that do something."""
    model = tiny_model(family).double()
    attach_lora(model, LoRAConfig(rank=3))
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def merged(model: nn.Module) -> nn.Module:
    merge_lora(model)
    return model


@pytest.mark.sampled
@pytest.mark.parametrize("settings", SETTINGS)
def test_pruned_then_merged_equals_merged_then_pruned(family: str, settings: str) -> None:
    first, second = adapted(family), merged(adapted(family))
    for model in (first, second):
        FASPPruner(SETTINGS[settings]).prune(model, BATCHES)
    assert has_adapters(first)
    assert plan_of(first) == plan_of(second)
    expected = second.state_dict()
    for name, value in merged(first).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-9, rtol=1e-7)


def test_adapters_do_not_count_as_parameters_of_the_model(family: str) -> None:
    config = basic(0.2, attention="value_dims")
    assert decide_budget(adapted(family), config) == decide_budget(tiny_model(family), config)


def test_adapted_model_can_be_pruned_twice(family: str) -> None:
    model = adapted(family)
    for sparsity in (0.1, 0.2):
        FASPPruner(basic(sparsity, attention="value_dims")).prune(model, BATCHES)
    before = model(input_ids=BATCHES[0], use_cache=False).logits
    after = merged(model)(input_ids=BATCHES[0], use_cache=False).logits
    torch.testing.assert_close(before, after)


def test_original_shapes_come_back_with_adapters(family: str) -> None:
    model, shapes = adapted(family), {name: value.shape for name, value in adapted(family).state_dict().items()}
    FASPPruner(basic(0.2, attention="value_dims")).prune(model, BATCHES)
    conform(model, None)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    model(input_ids=BATCHES[0], use_cache=False)


def test_adapter_that_is_not_plain_lora_is_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"], use_dora=True), model)
    with pytest.raises(ValueError, match="must be plain LoRA to be pruned along"):
        FASPPruner(basic(0.2)).prune(model, BATCHES)


def test_model_with_adapters_is_not_saved(tmp_path: Any) -> None:
    model = adapted("llama")
    FASPPruner(basic(0.2)).prune(model, BATCHES)
    with pytest.raises(ValueError, match="must have its LoRA merged"):
        save_pruned(model, tmp_path / "out")
