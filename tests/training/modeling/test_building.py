"""The model that a module trains: built from a config and a seed, or read from a folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_lightning import SCRATCH

from fasp_lightning.training.modeling.building import new_model, read_model, recompute_activations, seeded


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_new_model_has_the_config_and_dtype_that_were_asked_for(dtype: str, expected: torch.dtype) -> None:
    model = new_model(SCRATCH, dtype)
    assert {name: getattr(model.config, name) for name in SCRATCH} == SCRATCH
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_new_model_takes_the_attention_that_was_asked_for() -> None:
    assert new_model(SCRATCH, "float32", attn_implementation="eager").config._attn_implementation == "eager"


def test_drawing_from_a_seed_leaves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    with seeded(3):
        assert torch.equal(first, torch.rand(4))


def test_read_model_equals_the_saved_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    found = read_model(str(tmp_path), "float32")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_family_that_is_not_registered_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertLMHeadModel"]}')
    with pytest.raises(ValueError, match="bert"):
        read_model(str(tmp_path), "float32")


@pytest.mark.parametrize("family", TINY)
def test_gradients_are_the_same_where_activations_are_recomputed(family: str) -> None:
    """Also with frozen embeddings, which the reentrant kind of checkpointing cannot train behind."""
    tokens, gradients = random_tokens(), []
    for recompute in (False, True):
        model: Any = tiny_model(family).train()
        model.get_input_embeddings().requires_grad_(False)
        if recompute:
            recompute_activations(model)
            model = pickle.loads(pickle.dumps(model))
        torch.manual_seed(0)  # of dropout, where a family has it
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
