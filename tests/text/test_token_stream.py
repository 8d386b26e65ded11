"""Streamed text: the same packing, divided without overlap, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_text import words
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import token_shards, token_stream
from fasp_lightning.text.packed_cache import pack
from fasp_lightning.text.token_stream import TokenStream, as_batch
from fasp_lightning.text.tokens import Packing


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "WINDOW", 6)
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 300)


def stream(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[list[str]],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> TokenStream:
    opened = [(f"text {number}", partial(list, text)) for number, text in enumerate(texts)]
    return TokenStream(opened, weights, [Packing(tokenizer, 16)] * len(texts), 2, 0, **options)


@pytest.mark.parametrize(("weights", "share"), [(None, 1 / 2), ([3, 1], 3 / 4)])
def test_every_window_is_mixed_by_the_weights(
    weights: list[float] | None, share: float, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [["a" * 100] * 9, ["b" * 100] * 9]
    mixed = stream(tiny_tokenizer, texts, weights)
    for count in (12, 48):
        batches = torch.cat([batch["input_ids"] for batch in islice(mixed, count)])
        of_first = (batches == tiny_tokenizer.convert_tokens_to_ids("a")).any(1).double().mean()
        assert float(of_first) == pytest.approx(share, abs=0.5 / count)


def test_sequences_are_shuffled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (packed,) = pack(words(40), Packing(tiny_tokenizer, 16))
    window = torch.cat([batch["input_ids"] for batch in islice(stream(tiny_tokenizer, [words(40)]), 3)]).tolist()
    assert window != packed[:6]
    assert sorted(window) == sorted(packed[:6])


def test_a_part_without_a_sequence_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="text 0 is too short to stream: its part 2 of 2 has 0 tokens"):
        next(iter(stream(tiny_tokenizer, [words(1)], rank=1, world_size=2)))


@pytest.mark.parametrize("given", [1, 3, 4, 7])
def test_a_state_goes_on_with_the_next_batch(given: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [words(20), words(20, seed=1)]
    whole = list(islice(stream(tiny_tokenizer, texts, [2, 1]), 12))
    resumed = stream(tiny_tokenizer, texts, [2, 1])
    resumed.states = [whole[given - 1]["state"]]
    for one, other in zip(islice(resumed, 5), whole[given:], strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_a_batch_is_of_ids_and_equal_labels() -> None:
    ids = torch.arange(6).view(2, 3)
    batch = as_batch(ids)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["labels"], ids)
    assert batch["labels"] is not ids
