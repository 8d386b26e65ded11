"""The tokenised texts of roles: nothing in common, as many sequences as are asked for, errors where they matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import words, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import role_cache, tokens
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.role_cache import RoleCache
from fasp_lightning.text.roles import ROLES, RoleTexts, as_texts
from fasp_lightning.text.tokens import token_batches


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """A cache of the roles' texts."""

    def new(source: str | None = None, seed: int = 0, short: tuple[str, ...] = (), **given: Any) -> RoleCache:
        roles = RoleTexts.resolve(source, {role: as_texts(texts) for role, texts in given.items()})
        return RoleCache(roles, tiny_tokenizer, 16, seed, tmp_path / "cache", short)

    return new


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", words(200))


def ids(cache: RoleCache, role: str) -> Tensor:
    return torch.cat([text.sequences[:]["input_ids"] for text in cache.get(role)])


def test_no_document_is_in_two_roles(make: Any, rows: str) -> None:
    cache = make(rows)
    marks = [set().union(*(text.documents for text in cache.get(role))) for role in ROLES]
    assert sum(map(len, marks)) == len(set().union(*marks)) == 200


def test_documents_of_the_roles_before_are_taken(make: Any, rows: str) -> None:
    cache = make(rows)
    assert cache.taken("test") == frozenset()
    assert cache.taken("calibration") == cache.get("test")[0].documents | cache.get("validation")[0].documents
    assert cache.before("train") == [text for role in ROLES[:3] for text in cache.get(role)]


@pytest.mark.parametrize("seed", [None, 4])
def test_a_number_of_sequences_means_what_it_means_to_the_engine(
    seed: int | None, make: Any, rows: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = TextConfig(rows, split="test", sequences=7, seed=seed)
    found = ids(make("builtin:topics", seed=2, test=[text]), "test")
    engine = TextConfig(rows, split="test", sequences=7, seed=2 if seed is None else seed, seq_len=16)
    assert torch.equal(found, torch.cat(token_batches(engine, tiny_tokenizer)))


def test_no_more_is_read_than_is_drawn_from(make: Any, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "POOL_BLOCKS", 10)
    monkeypatch.setattr(tokens, "POOL_FACTOR", 2)
    whole = ids(make(rows), "test")
    found = ids(make(rows, test=[TextConfig(rows, sequences=6)]), "test")
    places = [whole.tolist().index(one) for one in found.tolist()]
    assert len(places) == 6
    assert max(places) < 12


@pytest.mark.parametrize(("sequences", "expected"), [("auto", 5), (None, None), (9, 9)])
def test_the_whole_text_of_a_short_role_must_be_asked_for(
    sequences: Any, expected: int | None, make: Any, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role_cache, "POOL_BLOCKS", 5)
    whole = ids(make(rows), "calibration")
    text = TextConfig(rows, sequences=sequences)
    found = ids(make(rows, short=("calibration",), calibration=[text]), "calibration")
    assert len(found) == (len(whole) if expected is None else expected)
    if sequences == "auto":
        assert torch.equal(found, whole[:5])


def test_too_few_sequences_are_refused(make: Any, rows: str) -> None:
    text = r"the validation text 'rows\.jsonl' \(what falls to validation, as .* divide it\)"
    missing = r"it has \d+ sequences, and sequences=5000 are asked for; give more text"
    with pytest.raises(ValueError, match=rf"{text} is too short: {missing}"):
        make(rows, validation=[TextConfig(rows, sequences=5000)]).get("validation")


def test_what_cannot_be_read_matters_where_it_is_asked_for(make: Any, rows: str, caplog: Any) -> None:
    cache = make(rows, test=["missing.jsonl"])
    assert not cache.ready("test")
    assert len(ids(cache, "train"))
    assert caplog.text.count("there is no test text, which matters only if it is asked for") == 1
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
            cache.get("test")


@pytest.mark.parametrize("change", ["limit", "text", "tokenizer", "seq_len", "what roles before have"])
def test_whatever_changes_the_sequences_changes_the_key(
    change: str, make: Any, rows: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    key, limit = make(rows).key("train", 0, None), 5 if change == "limit" else None
    assert make(rows).key("train", 0, None) == key
    options: dict[str, Any] = {}
    if change == "text":
        write_rows(Path(rows), words(201))
    elif change == "what roles before have":
        options["test"] = [write_rows(tmp_path / "other.jsonl", words(5, seed=3))]
    other = make(rows, **options)
    if change == "tokenizer":
        other._digest = "another"
    elif change == "seq_len":
        other.seq_len = 17
    assert other.key("train", 0, limit) != key


def test_the_seed_of_a_drawing_shares_the_entry(make: Any, rows: str, tmp_path: Path) -> None:
    texts = [TextConfig(rows, sequences=5)]
    one, two = (ids(make("builtin:topics", seed=seed, test=texts), "test") for seed in (0, 1))
    assert not torch.equal(one, two)
    assert len(list((tmp_path / "cache").iterdir())) == 1
