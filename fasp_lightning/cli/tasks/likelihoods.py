"""Log-likelihoods of continuations: a context that several continuations share is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

Request = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation, neither of them empty."""

Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether each of its tokens is the likeliest."""


class Row(NamedTuple):
    """One continuation.

    Attributes:
        request: Its index among the requests.
        fed: The context's last token and the continuation but for its last one: what predicts the continuation.
        wanted: The continuation.
    """

    request: int
    fed: list[int]
    wanted: list[int]


class Batch(NamedTuple):
    """Contexts of one length, so that none is padded, with their continuations.

    Attributes:
        prefixes: The contexts but for their last token, (contexts, tokens).
        rows: The continuations of each context.
    """

    prefixes: list[tuple[int, ...]]
    rows: list[list[Row]]


def batches_of(requests: Sequence[Request], size: int, max_length: int) -> list[Batch]:
    """Requests in batches, the longest first, since those are the ones that may not fit.

    Args:
        requests: The requests.
        size: Continuations in a batch, as long as a context's own are not more.
        max_length: Tokens that the model takes; what is longer loses its beginning.
    """
    shared: dict[tuple[int, ...], list[Row]] = {}
    for index, (context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) : -1]
        start = len(tokens) - len(continuation)
        shared.setdefault(tuple(tokens[:start]), []).append(Row(index, tokens[start:], continuation))
    ordered = sorted(shared, key=lambda prefix: (-len(prefix), -max(len(row.fed) for row in shared[prefix])))
    return [
        Batch(prefixes, [shared[prefix] for prefix in prefixes])
        for _, alike in groupby(ordered, len)
        for prefixes in _filled(alike, shared, size)
    ]


def _filled(
    prefixes: Iterator[tuple[int, ...]], shared: dict[tuple[int, ...], list[Row]], size: int
) -> Iterator[list[tuple[int, ...]]]:
    """Contexts until their continuations fill a batch."""
    batch: list[tuple[int, ...]] = []
    rows = 0
    for prefix in prefixes:
        if batch and rows + len(shared[prefix]) > size:
            yield batch
            batch, rows = [], 0
        batch.append(prefix)
        rows += len(shared[prefix])
    yield batch


@torch.no_grad()
def score(model: Any, batch: Batch) -> list[tuple[int, Answer]]:
    """The answers to a batch, each with the index of its request.

    Args:
        model: A causal language model with a cache, in evaluation mode.
        batch: The batch.
    """
    rows = [row for of_context in batch.rows for row in of_context]
    owner = [context for context, of_context in enumerate(batch.rows) for _ in of_context]
    cache = _cache(model, batch.prefixes, torch.tensor(owner, device=model.device))
    length = max(len(row.fed) for row in rows)
    # padded on the right, where no token of a continuation looks
    fed = torch.tensor([row.fed + [0] * (length - len(row.fed)) for row in rows], device=model.device)
    logits = model(fed, past_key_values=cache, use_cache=cache is not None).logits
    return [(row.request, _answer(logits[i, : len(row.wanted)], row.wanted)) for i, row in enumerate(rows)]


def _cache(model: Any, prefixes: list[tuple[int, ...]], owner: Tensor) -> Any:
    """What the model keeps of the contexts, once for each continuation: ``owner`` names its context."""
    if not prefixes[0]:
        return None
    # the trunk alone: no logits of contexts
    cache = model.base_model(torch.tensor(prefixes, device=model.device), use_cache=True).past_key_values
    cache.reorder_cache(owner)
    return cache


def _answer(logits: Tensor, wanted: list[int]) -> Answer:
    """The answer from a continuation's logits, (tokens, vocabulary); fp32, as sums in bf16 leave ties."""
    tokens = torch.tensor(wanted, device=logits.device)
    likelihoods = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])
    return float(likelihoods.sum()), bool((logits.argmax(-1) == tokens).all())
