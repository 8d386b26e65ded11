"""Which parameters sparsity counts."""

from __future__ import annotations

import pytest
from tiny import TINY, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fasp_lightning import spec_for
from fasp_lightning.structure.resolve import is_linear, linear_parameters, parameter_count
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora


@pytest.mark.parametrize("family", TINY)
def test_linear_parameters_are_those_of_the_blocks_matrices_and_their_biases(family: str) -> None:
    model = tiny_model(family)
    layers = spec_for(model).layers
    expected = sum(
        module.weight.numel() + (0 if module.bias is None else module.bias.numel())
        for name, module in model.named_modules()
        if name.startswith(f"{layers}.")
        and (isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ == "FalconLinear")
    )
    assert linear_parameters(model, spec_for(model)) == expected


def test_tied_parameters_count_once() -> None:
    model = tiny_model("llama-gqa")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert parameter_count(model) == sum({id(one): one.numel() for one in model.parameters()}.values())


def test_adapters_do_not_count() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    attach_lora(model, LoRAConfig(rank=2))
    spec = spec_for(plain)
    assert (parameter_count(model), linear_parameters(model, spec)) == (
        parameter_count(plain),
        linear_parameters(plain, spec),
    )


@pytest.mark.parametrize(
    ("module", "linear"),
    [
        (nn.Linear(2, 3), True),
        (Conv1D(2, 3), True),
        (nn.Embedding(2, 3), False),
        (nn.LayerNorm(2), False),
        (nn.GELU(), False),
    ],
)
def test_a_linear_layer_is_a_matrix_that_is_no_embedding(module: nn.Module, linear: bool) -> None:
    assert is_linear(module) == linear
