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
from fasp_lightning.text.token_shards import ShardReader
from fasp_lightning.text.tokens import Packing, encode_documents


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 300)


def reader(tokenizer: PreTrainedTokenizerFast, text: list[str], shard: int = 0, shards: int = 1, **options: Any):
    return ShardReader(partial(list, text), "text", Packing(tokenizer, 16), shard, shards, **options)


def test_a_part_is_packed_like_a_cached_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (packed,) = pack(words(40), Packing(tiny_tokenizer, 16))
    assert list(islice(reader(tiny_tokenizer, words(40)), len(packed))) == packed


def test_parts_hold_each_document_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = words(9)
    for shard in range(3):
        (packed,) = pack(text[shard::3], Packing(tiny_tokenizer, 16))
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
def test_a_packing_puts_its_separator_between(separator: str | None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    expected = encode_documents(["one", "two"], tiny_tokenizer, separator)
    assert Packing(tiny_tokenizer, 16, separator).encode(["one", "two"]) == expected


def test_a_part_is_packed_with_bos_like_a_cached_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    packing = Packing(tiny_tokenizer, 16, bos=1)
    (packed,) = pack(words(40), packing)
    found = list(islice(ShardReader(partial(list, words(40)), "text", packing, 0, 1), len(packed)))
    assert found == packed
    assert {(len(sequence), sequence[0]) for sequence in found} == {(16, 1)}
    (plain,) = pack(words(40), Packing(tiny_tokenizer, 15))
    assert [sequence[1:] for sequence in packed] == plain
