"""The one description of a text: what its fields mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasp_lightning.text.config import Extent, TextConfig, describe, for_role
from fasp_lightning.text.roles import as_texts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "builtin:poems"}, "builtin:topics, builtin:docstrings, .*got 'builtin:poems'"),
        ({"source": "my corpus"}, "source must be one of .*got 'my corpus'"),
        ({"source": ""}, "source must be one of .*got ''"),
        ({"split": "dev"}, "must be one of calibration, train, test, validation, got 'dev'"),
        ({"source": "a.txt", "split": "dev"}, "split of source 'a.txt' must be one of .*got 'dev'"),
        ({"subset": "en"}, "subset is for the hub alone, got 'en'"),
        ({"seq_len": 1}, "seq_len must be 2 or more, got 1"),
        ({"sequences": 0}, "sequences must be 1 or more, got 0"),
        ({"sequences": "all"}, "sequences must be a number, None or 'auto', got 'all'"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"token_weight": 0}, "token_weight must be positive and finite, got 0 for source 'builtin:topics'"),
        ({"epoch_weight": float("inf")}, "epoch_weight must be positive and finite, got inf"),
    ],
)
def test_bad_fields_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TextConfig(split="test"), "topics (test)"),
        (TextConfig("builtin:docstrings", split="validation"), "docstrings (validation)"),
        (TextConfig("far/away/articles.jsonl"), "articles.jsonl"),
        (TextConfig("far/away/articles.jsonl", split="train"), "articles.jsonl (train)"),
        (
            TextConfig("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            "wikitext, wikitext-2-raw-v1 (test)",
        ),
    ],
)
def test_a_text_is_named_for_a_table(config: TextConfig, name: str) -> None:
    assert describe(config) == name


@pytest.mark.parametrize(
    ("source", "split", "role", "expected"),
    [
        ("builtin:topics", None, "calibration", "calibration"),
        ("builtin:topics", None, "test", "test"),
        ("builtin:topics", "train", "test", "train"),
        ("a.txt", None, "calibration", None),
        ("some/set", None, "calibration", "train"),
        ("some/set", None, "test", "test"),
        ("some/set", "dev", "test", "dev"),
    ],
)
def test_a_role_gives_the_split_left_open(source: str, split: str | None, role: str, expected: str | None) -> None:
    assert for_role(TextConfig(source, split=split), role).split == expected


def test_a_saved_data_set_has_its_own_splits(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = f"{tmp_path}/set"
    assert TextConfig(source, split="train").source == f"{source}/train"
    assert for_role(TextConfig(source), "calibration") == TextConfig(f"{source}/train")
    assert describe(for_role(TextConfig(source), "test")) == "set (test)"
    assert for_role(TextConfig(source), "validation").source == source  # is refused where it is read
    with pytest.raises(ValueError, match=r"split of source '.*set' must be one of test, train, got 'calibration'"):
        TextConfig(source, split="calibration")
    assert TextConfig(f"{source}/train", split="calibration").split == "calibration"


def test_a_source_may_be_a_path() -> None:
    assert TextConfig(Path("far/a.txt")) == TextConfig("far/a.txt")  # type: ignore[arg-type]
    assert as_texts([Path("far/a.txt")]) == as_texts(Path("far/a.txt")) == (TextConfig("far/a.txt"),)  # type: ignore


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match=r"role must be one of .*got 'dev'"):
        for_role(TextConfig(), "dev")


def test_what_is_left_open_is_that_of_the_run() -> None:
    assert TextConfig().extent() == Extent(64, 512, 1, 0)
    assert TextConfig().extent(None, 16, 4, 7) == Extent(None, 16, 4, 7)


def test_what_is_set_stays() -> None:
    text = TextConfig(split="test", sequences=8, seed=3, seq_len=256, batch_size=4)
    assert text.extent() == text.extent(1, 2, 2, 2) == Extent(8, 256, 4, 3)


def test_the_whole_text_is_not_the_default_number() -> None:
    assert TextConfig(sequences=None).extent().sequences is None
    assert TextConfig(sequences="auto").extent().sequences == 64
    assert (TextConfig(sequences=None).number, TextConfig().number, TextConfig(sequences=3).number) == (None, None, 3)


@pytest.mark.parametrize("role", ["train", "test", "validation"])
def test_tokens_are_weighed_in_calibration_alone(role: str) -> None:
    text = TextConfig("a.txt", token_weight=0.5)
    assert for_role(text, "calibration") == text
    with pytest.raises(ValueError, match=r"token_weight must be 1 for all but calibration text, got 0\.5 for a\.txt"):
        for_role(text, role)


@pytest.mark.parametrize("role", ["calibration", "test", "validation"])
def test_epochs_are_weighed_in_training_alone(role: str) -> None:
    text = TextConfig("a.txt", epoch_weight=2)
    assert for_role(text, "train") == text
    with pytest.raises(ValueError, match=r"epoch_weight must be None for all but training text, got 2 for a\.txt"):
        for_role(text, role)


def test_the_other_weight_is_named_where_it_is_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"or set token_weight$"):
        for_role(TextConfig("a.txt", epoch_weight=2), "calibration")
