"""Modes of a model end with their block, whatever happens in it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model

from fasp_lightning.structure.modes import evaluating, frozen, insist, placed, requiring_gradients


def state(model: Any) -> Any:
    parameters = {name: (one.requires_grad, one.device) for name, one in model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return {name: module.training for name, module in model.named_modules()}, parameters, hooks, torch.is_grad_enabled()


def mixed_model() -> Any:
    model = tiny_model("llama")
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    return model


MODES = {
    "evaluating": evaluating,
    "frozen": frozen,
    "requiring-gradients": lambda model: requiring_gradients(model.get_input_embeddings()),
    "placed": lambda model: placed(model, torch.device("cpu")),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_model_is_as_before_afterwards(mode: Any, fails: bool) -> None:
    model = mixed_model()
    before = state(model)
    context: AbstractContextManager[None] = mode(model)
    if fails:
        with pytest.raises(KeyError), context:
            raise KeyError
    else:
        with context:
            pass
    assert state(model) == before


def test_evaluation_takes_no_gradients_and_drops_nothing() -> None:
    model = mixed_model()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(random_tokens()).logits.requires_grad


def test_all_that_follows_the_embeddings_has_gradients_though_no_parameter_has() -> None:
    model = mixed_model()
    with frozen(model), requiring_gradients(model.get_input_embeddings()):
        logits = model(random_tokens()).logits
        logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_part_computes_where_it_is_placed() -> None:
    linear = torch.nn.Linear(2, 2)
    moved = []
    linear.to = lambda device: moved.append(torch.device(device)) or linear  # type: ignore[method-assign]
    with placed(linear, torch.device("meta")):
        assert moved == [torch.device("meta")]
    assert moved == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.parametrize(("error", "taken"), [(KeyboardInterrupt, "abbc"), (KeyError, "abc")])
def test_every_step_of_a_way_back_is_taken(error: type[BaseException], taken: str) -> None:
    """One that a Ctrl-C has interrupted twice; the error is raised at the end."""
    done: list[str] = []

    def second() -> None:
        done.append("b")
        if done.count("b") == 1:
            raise error

    with pytest.raises(error):
        insist(lambda: done.append("a"), second, lambda: done.append("c"))
    assert "".join(done) == taken
