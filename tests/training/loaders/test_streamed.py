"""The loader of streamed text: epochs of equal length, each begun where the last one ended."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tiny_text import words
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import token_shards, token_stream
from fasp_lightning.text.token_stream import TokenStream
from fasp_lightning.text.tokens import Packing
from fasp_lightning.training.loaders.cached import ResumableLoader
from fasp_lightning.training.loaders.streamed import StreamLoader


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "WINDOW", 6)
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 300)


def stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[list[str]], **options: Any) -> TokenStream:
    opened = [(f"text {number}", partial(list, text)) for number, text in enumerate(texts)]
    return TokenStream(opened, None, [Packing(tokenizer, 16)] * len(texts), 2, 0, **options)


def epoch(loader: StreamLoader, number: int) -> list[list[list[int]]]:
    loader.set_epoch(number)
    return [batch["input_ids"].tolist() for batch in loader]


def test_workers_of_all_processes_read_different_parts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def first(rank: int, workers: int) -> list[Tensor]:
        loader = StreamLoader(
            stream(tiny_tokenizer, [words(60)], rank=rank, world_size=2, workers=workers), 6, num_workers=workers
        )
        return [batch["input_ids"] for batch in loader]

    rows = [tuple(row) for rank in (0, 1) for batch in first(rank, 2) for row in batch.tolist()]
    assert len(set(rows)) == len(rows) == 24


def test_an_epoch_begins_where_the_last_one_ended(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = (StreamLoader(stream(tiny_tokenizer, [words(40)]), batches) for batches in (3, 6))
    assert len(short) == 3
    assert epoch(short, 0) + epoch(short, 1) == epoch(long, 0)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_state_goes_on_with_the_next_batch(stop: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole, stopped, resumed = (StreamLoader(stream(tiny_tokenizer, [words(40)]), 5) for _ in range(3))
    batches = iter(stopped)
    for _ in range(stop):
        next(batches)
    resumed.load_state_dict(stopped.state_dict())
    assert epoch(resumed, 0) == epoch(whole, 0)[stop:]


def test_another_number_of_parts_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = (StreamLoader(stream(tiny_tokenizer, [words(40)], workers=workers), 5) for workers in (1, 2))
    with pytest.raises(ValueError, match=r"it was stopped with \(1 and 1\), got 1 and 2; the text is divided"):
        two.load_state_dict(one.state_dict())


def test_the_state_of_cached_text_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="got one whose training text was cached; set streaming to false"):
        StreamLoader(stream(tiny_tokenizer, [words(40)]), 5).load_state_dict(ResumableLoader([], 2, []).state_dict())


def test_the_state_is_that_of_all_processes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    loader = StreamLoader(stream(tiny_tokenizer, [words(40)]), 5, gather=lambda state: [state, "the other's"])
    assert loader.state_dict()["ranks"][1] == "the other's"


def test_no_global_random_state_is_drawn_from(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    list(StreamLoader(stream(tiny_tokenizer, [words(40)]), 5))
    assert torch.equal(torch.get_rng_state(), before)
