"""A twin is tiny, of the same class, and has blocks of every kind."""

from __future__ import annotations

import copy

import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning.structure.inferring.twin import run, twin


def large(model_type: str, **options: object):
    """A model of a large default config, without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))


def test_twin_has_the_class_the_kinds_of_layers_and_few_parameters() -> None:
    model = large("gemma3_text")
    before = copy.deepcopy(model.config)
    small = twin(model)
    assert type(small) is type(model)
    assert sum(parameter.numel() for parameter in small.parameters()) < 1e6
    assert small.config.layer_types == model.config.layer_types[: len(small.model.layers)]
    assert set(small.config.layer_types) == set(model.config.layer_types)
    assert model.config.to_dict() == before.to_dict()


def test_twin_keeps_whether_kv_heads_are_shared() -> None:
    for heads, kept in ((8, 4), (2, 2), (1, 1)):
        small = twin(AutoConfig.for_model("llama", num_attention_heads=8, hidden_size=256, num_key_value_heads=heads))
        assert small.config.num_key_value_heads == kept


def test_twin_is_the_same_again_and_of_a_pruned_model_whole() -> None:
    model = tiny_model("llama")
    model.config.fasp = {"form": "compact"}
    first, second = twin(model), twin(model)
    assert torch.equal(run(first), run(second))
    assert getattr(first.config, "fasp", None) is None
