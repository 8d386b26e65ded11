"""One worker's part of a text: packed as the cache packs it, and resumable at any sequence."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import Any

import pytest
from tiny_text import words
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import token_shards
from fasp_lightning.text.packed_cache import pack
from fasp_lightning.text.token_shards import Encoder, ShardReader
from fasp_lightning.text.tokens import encode_documents


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 300)


def reader(tokenizer: PreTrainedTokenizerFast, text: list[str], shard: int = 0, shards: int = 1, **options: Any):
    encode = Encoder(tokenizer, None)
    return ShardReader(partial(list, text), "text", encode, 16, shard, shards, **options)


def test_a_part_is_packed_like_a_cached_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (packed,) = pack(words(40), tiny_tokenizer, 16)
    assert list(islice(reader(tiny_tokenizer, words(40)), len(packed))) == packed


def test_parts_hold_each_document_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = words(9)
    for shard in range(3):
        (packed,) = pack(text[shard::3], tiny_tokenizer, 16)
        assert list(islice(reader(tiny_tokenizer, text, shard, 3), len(packed))) == packed


def test_a_cursor_continues_at_any_sequence_and_over_the_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = reader(tiny_tokenizer, words(12))
    cursors, sequences = [], []
    for sequence in islice(whole, 250):  # more than two passes
        sequences.append(sequence)
        cursors.append(list(whole.cursor))
    assert cursors[-1][0] >= 2
    for place, cursor in enumerate(cursors[:-5]):
        again = reader(tiny_tokenizer, words(12), cursor=cursor)
        assert list(islice(again, 5)) == sequences[place + 1 : place + 6]


def test_reading_begins_anew_at_the_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The rest that made no sequence stands before the start of the next pass."""
    text = words(3)
    ids = encode_documents(text, tiny_tokenizer)
    found = list(islice(reader(tiny_tokenizer, text), 3 * len(ids) // 16))
    assert list(chain(*found)) == (3 * ids)[: len(found) * 16]


def test_a_part_without_a_sequence_names_what_to_change(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"text is too short to stream: its part 1 of 1 has 5 tokens.*seq_len=16"):
        next(iter(reader(tiny_tokenizer, ["abcd"])))


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_an_encoder_puts_its_separator_between(separator: str | None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    expected = encode_documents(["one", "two"], tiny_tokenizer, separator)
    assert Encoder(tiny_tokenizer, separator)(["one", "two"]) == expected
