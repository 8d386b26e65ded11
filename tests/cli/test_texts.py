"""Which text is of the calibration's kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasp_lightning.cli.texts import domain_of, missing_domain
from fasp_lightning.text.config import TextConfig

TOPICS = TextConfig("builtin:topics", split="calibration")
HUB = TextConfig("owner/set", subset="one", split="train")


@pytest.mark.parametrize(
    ("text", "calibration", "domain"),
    [
        (TextConfig("builtin:topics", split="test"), [TOPICS], "calibrated"),
        (TextConfig("builtin:docstrings", split="test"), [TOPICS], "other"),
        (TextConfig("builtin:docstrings", split="test"), [HUB, TextConfig("builtin:docstrings")], "calibrated"),
        (TextConfig("owner/set", subset="one", split="test"), [HUB], "calibrated"),
        (TextConfig("owner/set", subset="two", split="test"), [HUB], "other"),
        (TextConfig("builtin:topics", split="test"), [], "other"),
    ],
)
def test_domain_follows_the_source_and_not_the_split(text: TextConfig, calibration: list, domain: str) -> None:
    assert domain_of(text, calibration) == domain


def test_local_files_of_one_folder_are_one_source(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/one.txt", "a/two.txt", "b/three.txt")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    one, two, three = (TextConfig(str(path)) for path in paths)
    assert domain_of(two, [one]) == "calibrated"
    assert domain_of(three, [one]) == "other"


def test_splits_of_a_saved_data_set_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "data-0.arrow").write_text("")
    train, test = (TextConfig(str(tmp_path), split=split) for split in ("train", "test"))
    assert domain_of(test, [train]) == "calibrated"


def test_one_domain_alone_is_said_and_both_or_none_are_not() -> None:
    assert "--other_text" in (missing_domain(["calibrated"]) or "")
    assert "--evaluation" in (missing_domain(["other", "other"]) or "")
    assert missing_domain(["calibrated", "other"]) is None
    assert missing_domain([]) is None
