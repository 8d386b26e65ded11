"""A plain copy computes what the model does, and takes no memory for what need not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model

from fasp_lightning.pruning.own_text.cache import weights_digest
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.training.modeling.copying import plain_copy
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora


def adapted(trained: bool) -> Any:
    model = tiny_model("llama")
    attach_lora(model, LoRAConfig(rank=2))
    if trained:
        for name, weight in model.named_parameters():
            weight.data += 0.1 * ("lora_B" in name)
    return model.train()


def state(model: Any) -> Any:
    return {name: (id(one), one.requires_grad, one.detach().clone()) for name, one in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
def test_it_computes_the_same_without_adapters_and_leaves_the_model(trained: bool) -> None:
    model = adapted(trained)
    before = state(model)
    found = plain_copy(model)
    assert not has_adapters(found)
    assert not any(weight.requires_grad for weight in found.parameters())
    torch.testing.assert_close(found(random_tokens()).logits, model.eval()(random_tokens()).logits)
    assert all(torch.equal(before[name][2], after[2]) for name, after in state(model).items())
    assert {name: one[:2] for name, one in state(model).items()} == {name: one[:2] for name, one in before.items()}


def test_adapters_that_do_nothing_yet_cost_nothing_and_do_not_count() -> None:
    model = adapted(trained=False)
    found = plain_copy(model)
    assert weights_digest(found) == weights_digest(tiny_model("llama"))
    assert {one.data_ptr() for one in found.parameters()} <= {one.data_ptr() for one in model.parameters()}


def test_weights_are_of_the_dtype_asked_for() -> None:
    model = tiny_model("opt")  # whose embeddings are tied
    found = plain_copy(model, dtype=torch.bfloat16)
    assert {one.dtype for one in found.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert len(list(found.parameters())) == len(list(model.parameters()))
