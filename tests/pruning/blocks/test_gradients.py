"""Loss sensitivity of columns, summed up during a backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from torch import Tensor

from fasp_lightning import FaspError
from fasp_lightning.pruning.blocks.gradients import ConsumerScores
from fasp_lightning.structure.plan import resolve_pruned


def recorded(model: Any, pairs: list[Any], weight: float = 1.0) -> tuple[ConsumerScores, dict[str, Tensor]]:
    """Scores of one pass, and Σ (x · ∂L/∂x)² from tensors that were kept."""
    kept: dict[str, Tensor] = {}
    handles = []
    for pair in pairs:

        def keep(_: Any, args: Any, layer: str = pair.layer) -> None:
            args[0].retain_grad()
            kept[layer] = args[0]

        handles.append(pair.consumer.register_forward_pre_hook(keep))
    scores = ConsumerScores()
    with scores.recording(pairs, weight):
        model(random_tokens()).logits.square().sum().backward()
    for handle in handles:
        handle.remove()
    found = {layer: (x.detach() * x.grad).square().flatten(0, 1).sum(0).double() for layer, x in kept.items()}
    return scores, found


def flat(model: Any) -> list[Any]:
    return [pair for block in resolve_pruned(model) for pair in block]


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_scores_are_squares_summed_over_tokens_times_the_weight(weight: float) -> None:
    model = tiny_model("llama")
    pairs = flat(model)
    scores, expected = recorded(model, pairs, weight)
    for pair, score in zip(pairs, scores.columns(pairs), strict=True):
        torch.testing.assert_close(score, weight * expected[pair.layer], rtol=1e-5, atol=1e-9)


def test_sums_of_two_passes_add_up() -> None:
    model = tiny_model("llama")
    pairs = flat(model)
    first, second = recorded(model, pairs)[0], recorded(model, pairs)[0]
    once = [score.clone() for score in first.columns(pairs)]
    first.add(second)
    for score, alone in zip(first.columns(pairs), once, strict=True):
        torch.testing.assert_close(score, 2 * alone)


def test_hooks_are_gone_after_an_error() -> None:
    pairs = flat(tiny_model("llama"))
    with pytest.raises(KeyError), ConsumerScores().recording(pairs, 1.0):
        raise KeyError
    assert not any(pair.consumer._forward_pre_hooks for pair in pairs)


def test_a_consumer_without_a_gradient_is_named() -> None:
    pairs = flat(tiny_model("llama"))
    with pytest.raises(FaspError, match=f"the loss must depend on the input of {pairs[0].layer}"):
        ConsumerScores().columns(pairs)
