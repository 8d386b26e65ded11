"""Which text is of the calibration's kind, and what its sequences begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_text import with_bos

from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
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


def test_where_the_tokenizer_adds_bos_it_is_added_and_said(fasp, prune, tiny_folder, tiny_tokenizer, tmp_path: Path):
    """On Gemma, whose tokenizer does."""
    folder = tiny_folder("gemma3")
    with_bos(tiny_tokenizer).save_pretrained(folder)
    outcome = prune(folder, "--pruning.own_text", "{tokens: 64, seq_len: 16}", "--prompt", "the")
    said = " ".join(outcome.err.split())
    assert "every sequence of topics (calibration), topics (test) begins with the tokenizer's <bos>" in said, outcome
    assert "sequences begin with" in outcome.out
    report = json.loads((tmp_path / "pruned" / REPORT_FILE).read_text())
    assert (report["calibration"]["bos"], report["evaluation"][0]["bos"]) == ("<bos>", "<bos>")
    text = "source: builtin:topics, split: test, seq_len: 16, sequences: 4"
    found = fasp("evaluate", "--model.name_or_path", tmp_path / "pruned", "--evaluation", f"[{{{text}}}]")
    assert "begins with" in found.out
    without = ("--calibration.add_bos", "false", "--evaluation", f"[{{{text}, add_bos: false}}]")
    plain = prune(folder, *without, "--overwrite", "true")
    assert plain.code == 0, plain
    assert "begin" not in plain.err + plain.out
