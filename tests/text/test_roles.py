"""Which text each role reads: no document serves two of them."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
from tiny_text import words, write_rows

from fasp_lightning.text import roles
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.roles import ROLES, RoleTexts, as_texts
from fasp_lightning.text.tokens import documents

Given = dict[str, Any]


def read(source: str | None = None, **given: Any) -> dict[str, list[str]]:
    """Role → its documents."""
    roles = RoleTexts.resolve(source, {role: as_texts(texts) for role, texts in given.items()})
    return {
        role: [text for index in range(len(roles.texts[role])) for text in roles.documents(role, index)]
        for role in ROLES
    }


def disjoint(found: dict[str, list[str]]) -> bool:
    return all(not set(found[one]) & set(found[other]) for one, other in combinations(found, 2))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", words(300))


def test_one_file_is_divided_among_all_roles_without_loss(rows: str) -> None:
    found = read(rows)
    assert disjoint(found)
    assert sorted(chain(*found.values())) == sorted(words(300))


def test_a_file_is_divided_as_the_splits_of_the_engine_are(rows: str) -> None:
    for role, found in read(rows).items():
        assert found == list(documents(TextConfig(rows, split=role)))


def test_built_in_text_has_a_split_for_each_role() -> None:
    found = read()
    assert disjoint(found)
    assert found["test"] == list(documents(TextConfig("builtin:topics", split="test")))


def test_roles_that_name_the_same_split_divide_it() -> None:
    split = TextConfig("builtin:topics", split="train")
    found = read(train=[split], validation=[split])
    assert disjoint(found)
    assert sorted(found["train"] + found["validation"] + found["calibration"] + found["test"]) == sorted(
        documents(TextConfig("builtin:topics", split="train"))
    )


def test_a_file_that_two_patterns_mean_is_divided(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_rows(tmp_path / f"{name}.jsonl", words(100, seed))
    found = read("builtin:topics", train=[str(tmp_path / "*.jsonl")], test=[str(tmp_path / "b.jsonl")])
    assert disjoint(found)
    assert set(words(100, 0)) <= set(found["train"])  # a is read for training alone
    assert set(words(100, 1)) == set(found["test"]) | set(found["train"]) - set(words(100, 0))


def test_splits_of_a_file_may_overlap_with_the_whole(rows: str) -> None:
    whole, train, test = (TextConfig(rows, split=split) for split in (None, "train", "test"))
    found = read("builtin:topics", train=[train], validation=[test], calibration=[whole])
    assert disjoint(found)
    assert all(found.values())
    assert set(found["train"]) < set(documents(train))
    assert set(found["validation"]) < set(documents(test))
    assert sum(len(found[role]) for role in ("train", "validation", "calibration")) == 300


def test_a_file_read_by_one_role_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words(200)), "utf-8")
    found = read("builtin:topics", train=[str(path)])
    assert found["train"] == [path.read_text("utf-8")]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_single_document_in_one_line_is_divided(name: str, tmp_path: Path) -> None:
    text, path = " ".join(words(4000)), tmp_path / name
    path.write_text(text if name.endswith(".txt") else json.dumps({"text": text}), "utf-8")
    found = read(str(path))
    assert disjoint(found)
    assert all(found.values())
    assert sum(map(len, chain(*found.values()))) == len(text)


def test_the_log_says_once_which_files_the_roles_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, words(20))
    resolved = RoleTexts.resolve(str(tmp_path), {})
    with caplog.at_level("INFO", logger="fasp_lightning"):
        for role in ROLES:
            resolved.identity(role, 0)
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: 2 files: a.jsonl, b.jsonl"]


def test_roles_without_a_text_of_their_own_share_the_training_text(rows: str) -> None:
    found = read(train=[rows])
    assert disjoint(found)
    assert all(found.values())


def test_calibration_takes_little_of_the_training_split_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(config: TextConfig) -> list[str]:
        return words(1000, seed=len(str(config.split)))

    monkeypatch.setattr(roles, "documents", hub)
    found = read("owner/data")
    assert set(found["train"]) | set(found["calibration"]) == set(words(1000, seed=5))
    assert not set(found["train"]) & set(found["calibration"])
    assert 20 < len(found["calibration"]) < 130
    assert len(found["test"]) == len(found["validation"]) == 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "no such thing"}, "source must be one of builtin:topics"),
        ({"epoch_weight": 0}, "epoch_weight must be positive and finite, got 0 for source 'builtin:topics'"),
        ({"epoch_weight": float("nan")}, "must be positive and finite, got nan"),
        ({"source": "builtin:topics", "sequences": 0}, "must be 1 or more, got 0"),
        ({"source": "builtin:topics", "split": "tset"}, "got 'tset'"),
    ],
)
def test_a_bad_text_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)


def test_weights_are_for_all_texts_or_for_none() -> None:
    texts = [TextConfig("builtin:topics", epoch_weight=1), TextConfig("builtin:docstrings")]
    with pytest.raises(ValueError, match="for all texts or for none, got none for builtin:docstrings"):
        as_texts(texts)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold one at least"):
        as_texts([])
