"""Answers in a folder's report: what replaces what, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from fasp_lightning.checkpoints.tasks.answers import Answers, Measured
from fasp_lightning.checkpoints.tasks.entries import entry_of, facts_in_entry, record_tasks

ARC = {"arc": Answers("acc_norm", "those of arc", [1, 1, 0, 1])}
WRONG = {"arc": Answers("acc_norm", "those of arc", [0, 0, 0, 1])}
PIQA = {"piqa": Answers("acc", "those of piqa", [1, 0])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fasp_report.json").write_text('{"sparsity": 0.2}')
    return tmp_path


def entry(answers: dict[str, Answers], against: Measured | None = None) -> dict[str, Any]:
    return entry_of(tiny_model("llama"), answers, against)


def told(folder: Path) -> list[tuple[str | None, list[str]]]:
    """What each entry is compared with, and its accuracies."""
    entries = json.loads((folder / "fasp_report.json").read_text())["tasks"]
    facts = [facts_in_entry(one) for one in entries]
    return [(one.against, [f"{row.name} {row.accuracy.value}" for row in one.rows]) for one in facts]


def test_answers_to_the_same_questions_replace_earlier_ones_and_others_stay(folder: Path) -> None:
    for answers in (ARC, PIQA, WRONG):
        assert record_tasks(folder, entry(answers))
    assert told(folder) == [(None, ["piqa 0.5"]), (None, ["arc 0.25"])]
    assert json.loads((folder / "fasp_report.json").read_text())["sparsity"] == 0.2


def test_what_is_measured_again_alone_stays_compared(folder: Path) -> None:
    record_tasks(folder, entry(ARC))
    record_tasks(folder, entry(ARC, Measured("/on/this/machine/dense", "float32", ARC)))
    assert told(folder) == [("dense", ["arc 0.75"])]
    record_tasks(folder, entry(WRONG))
    assert told(folder) == [("dense", ["arc 0.25"])]
    record_tasks(folder, entry(WRONG, Measured("other", "float32", ARC)))
    assert [name for name, _ in told(folder)] == ["dense", "other"]


def test_figures_are_of_the_model_and_of_the_other_one() -> None:
    found = facts_in_entry(entry(ARC | PIQA, Measured("dense", "float32", WRONG | PIQA)))
    arc, piqa, mean = found.rows
    assert (arc.name, arc.metric, arc.questions) == ("arc", "acc_norm", 4)
    assert (arc.accuracy.value, arc.theirs.value, arc.apart.value) == (0.75, 0.25, 0.5)
    assert (piqa.apart, mean.questions) == ((0.0, 0.5 - 0.5), None)
    assert mean.apart.value == 0.25


@pytest.mark.parametrize("damaged", ["x", [3, {"answers": 3}, {"answers": {"arc": 3}, "against": 3}]])
def test_damaged_entries_do_not_keep_others_out(folder: Path, damaged: Any) -> None:
    (folder / "fasp_report.json").write_text(json.dumps({"tasks": damaged}))
    assert record_tasks(folder, entry(ARC))
    kept = json.loads((folder / "fasp_report.json").read_text())["tasks"]
    assert facts_in_entry(kept[-1]).rows[0].accuracy.value == 0.75
