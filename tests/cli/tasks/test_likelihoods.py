"""Log-likelihoods with shared contexts are those of each sequence alone."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import TINY, WINDOW, tiny_model

from fasp_lightning.cli.tasks.likelihoods import Request, batches_of, score

MAX_LENGTH = 24


def requests() -> list[Request]:
    """Contexts of equal and of different lengths, one token and more, up to beyond the model's length."""
    draw = random.Random(0)
    tokens = lambda length: [draw.randrange(3, 97) for _ in range(length)]  # noqa: E731
    contexts = [tokens(length) for length in (1, 1, 4, 4, 4, WINDOW + 4, MAX_LENGTH)]
    found = [(context, tokens(draw.randrange(1, 6))) for context in contexts for _ in range(3)]
    draw.shuffle(found)
    return found


def alone(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """The plain formula, on one sequence."""
    tokens = (context + continuation)[-MAX_LENGTH - 1 :]
    logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :]
    return sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(continuation))


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_likelihood_is_that_of_the_sequence_alone(name: str) -> None:
    model, given = tiny_model(name), requests()
    found = dict(pair for batch in batches_of(given, 7, MAX_LENGTH) for pair in score(model, batch))
    expected = [alone(model, *request) for request in given]
    assert [found[index][0] for index in range(len(given))] == pytest.approx(expected, abs=1e-3)


def test_every_context_is_computed_once_in_batches_no_larger_than_asked() -> None:
    batches = batches_of(requests(), 7, MAX_LENGTH)
    prefixes = [prefix for batch in batches for prefix in batch.prefixes]
    assert len(prefixes) == len(set(prefixes))
    assert all(sum(map(len, batch.rows)) <= 7 for batch in batches)
    assert len(batches) < len(prefixes)


@torch.no_grad()
def test_continuation_is_greedy_where_each_token_is_the_likeliest() -> None:
    model, context = tiny_model("llama"), [5, 6, 7]
    greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % 97]
    (batch,) = batches_of([(context, greedy), (context, other)], 8, MAX_LENGTH)
    assert [greedily for _, (_, greedily) in score(model, batch)] == [True, False]
