"""Tokenised text on disk: whole or made anew, and drawn from as the engine draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import words, write_rows
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import tokens
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.packed_cache import Tokenised, TooShort, default_cache, drawn, pack, tokenised, without
from fasp_lightning.text.splits import distinct
from fasp_lightning.text.tokens import Packing, encode_documents, token_batches

TEXT = words(30)
Read = Callable[..., Tokenised]


@pytest.fixture
def read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Read:
    """Reads ``TEXT`` from the cache in ``tmp_path``, or puts it there."""

    def new(documents: list[str] = TEXT, **options: Any) -> Tokenised:
        return tokenised(tmp_path, "key", lambda: documents, Packing(tiny_tokenizer, 16), **options)

    return new


def ids(text: Tokenised) -> torch.Tensor:
    return text.sequences[:]["input_ids"]


def unread() -> list[str]:
    raise AssertionError("read again")


def test_sequences_are_the_text_end_to_end(read: Read, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_documents(TEXT, tiny_tokenizer)
    found = ids(read()).flatten().tolist()
    assert found == whole[: len(found)]
    assert len(whole) - len(found) < 16


def test_a_text_is_read_once(read: Read, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first = read()
    again = tokenised(tmp_path, "key", unread, Packing(tiny_tokenizer, 16))
    assert torch.equal(ids(first), ids(again))
    assert (first.key, first.documents, first.content) == (again.key, again.documents, again.content)
    assert first.documents == {distinct(text) for text in TEXT}


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff" * len(file.read_bytes()))


def forget(file: Path) -> None:
    about = json.loads(file.read_text())
    del about["content"]
    file.write_text(json.dumps(about))


def wrong(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"documents": 7}))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("about.json", "sequences.arrow") for damage in (shorten, scramble, empty)),
        ("about.json", forget),
        ("about.json", wrong),
        ("about.json", Path.unlink),
        ("sequences.arrow", Path.unlink),
    ],
)
def test_a_damaged_entry_is_made_anew(name: str, damage: Any, read: Read, tmp_path: Path, caplog: Any) -> None:
    first = ids(read()).clone()
    whole = {file.name: file.read_bytes() for file in (tmp_path / "key").iterdir()}
    damage(tmp_path / "key" / name)
    assert torch.equal(ids(read()), first)
    assert f"the cached text {tmp_path / 'key'} is damaged" in caplog.text
    assert {file.name: file.read_bytes() for file in (tmp_path / "key").iterdir()} == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_damaged_entry_that_cannot_be_made_anew_stays_damaged(read: Read, tmp_path: Path) -> None:
    read()
    empty(tmp_path / "key" / "about.json")
    with pytest.raises(TooShort):
        read([])
    assert (tmp_path / "key" / "about.json").read_bytes() == b""


def test_the_key_alone_names_an_entry(read: Read) -> None:
    assert torch.equal(ids(read()), ids(read(words(5, seed=1), limit=2)))


def test_a_limited_text_is_the_start(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole, five = (
        tokenised(tmp_path, key, lambda: TEXT, Packing(tiny_tokenizer, 16), limit=limit)
        for key, limit in (("whole", None), ("five", 5))
    )
    assert torch.equal(ids(five), ids(whole)[:5])
    assert five.content != whole.content


def test_sequences_are_drawn_as_the_engine_draws_them(
    read: Read, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", TEXT)
    for seed in (0, 3):
        config = TextConfig(file, seq_len=16, sequences=9, seed=seed)
        assert torch.equal(ids(drawn(read(), 9, seed)), torch.cat(token_batches(config, tiny_tokenizer)))


def test_what_is_drawn_has_a_hash_of_its_own(read: Read) -> None:
    text = read()
    contents = {drawn(text, wanted, seed).content for wanted in (3, 4) for seed in (0, 1)}
    assert len(contents | {text.content}) == 5
    assert drawn(text, 3, 0).content == drawn(text, 3, 0).content
    assert drawn(text, len(text.sequences), 0) is text


def test_more_than_there_is_cannot_be_drawn(read: Read) -> None:
    available = len(read().sequences)
    with pytest.raises(TooShort, match=rf"it has {available} sequences, and sequences={available + 1} are asked for"):
        drawn(read(), available + 1, 0)


def test_groups_change_nothing_in_what_is_packed(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(pack(TEXT, Packing(tiny_tokenizer, 16)), [])  # noqa: RUF017
    monkeypatch.setattr(tokens, "GROUP_LENGTH", 50)
    in_groups = list(pack(TEXT, Packing(tiny_tokenizer, 16)))
    assert len(in_groups) == len(TEXT)
    assert sum(in_groups, []) == whole  # noqa: RUF017


def test_too_short_a_text_says_what_it_has(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TooShort, match="it has 6 tokens, and one sequence of seq_len=16 needs 16"):
        list(pack(["short"], Packing(tiny_tokenizer, 16)))


def test_documents_of_another_role_are_left_out() -> None:
    taken = frozenset(filter(None, map(distinct, TEXT[:10])))
    assert list(without(["short", *TEXT], taken)) == ["short", *TEXT[10:]]
    assert list(without(TEXT, frozenset())) == TEXT


def test_the_cache_stands_beside_that_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", "/there")
    assert default_cache() == Path("/there/fasp_lightning")
