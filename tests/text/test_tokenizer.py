"""Tokenizers trained on the spot, and what tells tokenizers apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny_text import with_bos, words
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import tokenizer as module
from fasp_lightning.text.tokenizer import (
    SPECIALS,
    TokenizerTraining,
    bos_of,
    tokenizer_digest,
    train_tokenizer,
    trained_tokenizer,
)

SETTINGS = TokenizerTraining(vocab_size=300)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 258}, r"vocab_size must be 259 or more \(the bytes and the special tokens\), got 258"),
        ({"min_frequency": 0}, "min_frequency must be 1 or more, got 0"),
        ({"characters": 0}, "characters must be 1 or more, got 0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerTraining(**fields)


def test_specials_have_the_first_ids() -> None:
    trained = train_tokenizer(words(20), SETTINGS)
    assert trained.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2]
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert len(trained) == 300


def test_no_text_is_unknown() -> None:
    trained, text = train_tokenizer(["plain words"], TokenizerTraining(vocab_size=259)), "žluťoučký 龍\t\n"
    assert trained.decode(trained(text)["input_ids"]) == text


def test_no_more_text_is_read_than_is_trained_on() -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append("abcdefghij")
            yield read[-1]

    train_tokenizer(endless(), TokenizerTraining(vocab_size=260, characters=35))
    assert len(read) <= 5


def test_a_trained_tokenizer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained_tokenizer(tmp_path / "kept", words(20), SETTINGS)
    monkeypatch.setattr(module, "train_tokenizer", None)
    assert tokenizer_digest(trained_tokenizer(tmp_path / "kept", [], SETTINGS)) == tokenizer_digest(first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_the_digest_tells_what_changes_the_ids(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other_end = copy.deepcopy(tiny_tokenizer)
    other_end.eos_token = "<bos>"
    chats = copy.deepcopy(tiny_tokenizer)
    chats.chat_template = "{{ messages }}"
    tokenizers = (tiny_tokenizer, other_end, *(train_tokenizer(words(20, seed), SETTINGS) for seed in (0, 1)), chats)
    digests = [tokenizer_digest(one) for one in tokenizers]
    assert len(set(digests)) == len(digests)
    assert tokenizer_digest(copy.deepcopy(tiny_tokenizer)) == digests[0]
    assert tokenizer_digest(train_tokenizer(words(20), SETTINGS)) == digests[2]


def test_auto_is_what_the_tokenizer_itself_does(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    adding, bos = with_bos(tiny_tokenizer), tiny_tokenizer.bos_token_id
    assert [bos_of(tiny_tokenizer, how, "text") for how in ("auto", True, False)] == [None, bos, None]
    assert [bos_of(adding, how, "text") for how in ("auto", True, False)] == [bos, bos, None]


def test_a_tokenizer_without_bos_adds_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    without = copy.deepcopy(tiny_tokenizer)
    without.bos_token = None
    assert bos_of(without, "auto", "text") is None
    with pytest.raises(ValueError, match=r"add_bos must be false or 'auto'.*got True for 'text'"):
        bos_of(without, True, "text")
