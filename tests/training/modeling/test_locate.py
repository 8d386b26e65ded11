"""The causal LM is found in whatever holds it, or the refusal says what was found."""

from __future__ import annotations

import pytest
import torch
from runs import UserModule
from tiny import tiny_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from fasp_lightning.training.modeling.locate import find_causal_lm


def test_attribute_chooses_one_of_two() -> None:
    module = UserModule(tiny_model("llama"))
    module.teacher = tiny_model("opt")
    assert find_causal_lm(module, "teacher") is module.teacher
    assert find_causal_lm(module, "lm") is module.lm


def test_model_is_found_behind_peft_and_compilation() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    assert find_causal_lm(UserModule(torch.compile(model))) is model
    assert find_causal_lm(UserModule(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))) is model


def test_attribute_may_be_a_path() -> None:
    module = nn.Module()
    module.student = UserModule(tiny_model("llama"))
    assert find_causal_lm(module, "student.lm") is find_causal_lm(module) is module.student.lm


def test_model_itself_is_found_and_its_decoder_does_not_count() -> None:
    model = tiny_model("llama")
    assert find_causal_lm(model) is model
    with pytest.raises(ValueError, match="must hold one Hugging Face causal LM, found none"):
        find_causal_lm(model.model)


def test_attribute_without_a_model_is_refused() -> None:
    module = UserModule(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"UserModule.lm.model.layers must hold .*, found none"):
        find_causal_lm(module, "lm.model.layers")
    with pytest.raises(ValueError, match=r"attribute must be the path of a model in UserModule, got 'lm\.config'"):
        find_causal_lm(module, "lm.config")


def test_family_that_is_not_registered_is_refused() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True)
    with pytest.raises(ValueError, match="bert"):
        find_causal_lm(BertLMHeadModel(config))
