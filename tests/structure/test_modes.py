"""Modes of a model end with their block, whatever happens in it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model

from fasp_lightning.structure.modes import evaluating, frozen, hooked, insist, placed, requiring_gradients


def state(model: Any) -> Any:
    parameters = {name: (one.requires_grad, one.device) for name, one in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
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
    "hooked": lambda model: hooked(*2 * ([(one, print) for one in model.modules()],)),
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


def interrupted(mode: Any, model: Any, number: int) -> int:
    """Take a model into a mode and out of it, a Ctrl-C coming at the n-th line of the module; the lines there are."""
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != evaluating.__wrapped__.__code__.co_filename:  # type: ignore[attr-defined]
            return None
        lines += event == "line"
        if event == "line" and lines == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with mode(model):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_line_is_a_wrong_one_for_an_interrupt(mode: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).eval())
    model[0].bias.requires_grad_(False)
    model.get_input_embeddings = lambda: model[0]
    before, lines = state(model), interrupted(mode, model, 0)
    for number in range(1, lines + 1):
        interrupted(mode, model, number)
        assert state(model) == before, number


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
