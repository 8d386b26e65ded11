"""Streamed text: the same packing, divided without overlap, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_text import words
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import shard_reading, token_stream
from fasp_lightning.text.packed_cache import pack
from fasp_lightning.text.token_stream import TokenStream
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.loaders.cached import ResumableLoader
from fasp_lightning.training.loaders.streamed import StreamLoader


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "WINDOW", 6)
    monkeypatch.setattr(shard_reading, "GROUP_LENGTH", 300)


def stream(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[list[str]],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> TokenStream:
    opened = [(f"text {number}", partial(list, text)) for number, text in enumerate(texts)]
    return TokenStream(opened, weights, tokenizer, [None] * len(texts), 16, 2, 0, **options)


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
    (packed,) = pack(words(40), tiny_tokenizer, 16)
    window = torch.cat([batch["input_ids"] for batch in islice(stream(tiny_tokenizer, [words(40)]), 3)]).tolist()
    assert window != packed[:6]
    assert sorted(window) == sorted(packed[:6])


def test_workers_of_all_processes_read_different_parts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def first(rank: int, workers: int) -> list[Tensor]:
        loader = StreamLoader(
            stream(tiny_tokenizer, [words(60)], rank=rank, world_size=2, workers=workers), 6, num_workers=workers
        )
        return [batch["input_ids"] for batch in loader]

    rows = [tuple(row) for rank in (0, 1) for batch in first(rank, 2) for row in batch.tolist()]
    assert len(set(rows)) == len(rows) == 24


def test_a_part_without_a_sequence_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="text 0 is too short to stream: its part 2 of 2 has 0 tokens"):
        next(iter(stream(tiny_tokenizer, [words(1)], rank=1, world_size=2)))


def test_a_stream_leaves_out_what_other_roles_have(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    def new(streamed: bool) -> StreamLoader | ResumableLoader:
        data = CausalLMDataModule(
            tiny_tokenizer,
            seq_len=16,
            batch_size=2,
            sequences_per_epoch=12,
            streaming=streamed,
            cache_dir=str(tmp_path),
            seed=1,
        )
        data.prepare_data()
        return data.train_dataloader()

    cached = {tuple(row["input_ids"].tolist()) for row in map(new(False).dataset.__getitem__, range(12))}
    streamed = {tuple(row) for batch in new(True) for row in batch["input_ids"].tolist()}
    assert streamed == cached  # of the training split, from its start
