"""``fasp prune --stream``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fasp_lightning.cli.commands import prune_streamed as streamed


def test_streamed_it_tells_and_writes_what_it_does_in_memory(prune, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama-gqa")
    assert prune(folder, "--compare_unrestored", "false").code == 0
    (tmp_path / "pruned").rename(tmp_path / "whole")
    outcome = prune(folder, "--stream", "true")
    assert outcome.code == 0
    reports = [json.loads((tmp_path / name / "fasp_report.json").read_text()) for name in ("whole", "pruned")]
    for name in ("evaluation", "pairs"):
        for one, other in zip(*(report[name] for report in reports), strict=True):
            assert without_times(one) == without_times(other)
    assert reports[0]["weights"] == reports[1]["weights"]  # a mark of them
    assert reports[1]["saved"]["measured"]
    assert re.search(r"disk, beside the computing: .* GiB read at .* MB/s, .* GiB written at", outcome.out)


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if "second" not in name}
    return value


def test_a_model_larger_than_half_of_the_free_memory_is_streamed_and_that_is_said(
    prune, tiny_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "free_memory", lambda: 100_000)
    outcome = prune(tiny_folder("llama-gqa"), "--evaluation", "[]", "--pruning.own_text", "{}")
    assert outcome.code == 0
    told = " ".join(outcome.err.split())
    assert "the model is streamed, a block at a time" in told
    assert "own text is not in its cache, and left out" in told
    assert "disk, beside the computing" in outcome.out


def test_one_that_cannot_be_streamed_is_not_unasked_and_that_is_said(
    prune, tiny_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "free_memory", lambda: 100_000)
    outcome = prune(tiny_folder("llama-gqa"), "--evaluation", "[]", "--prompt", "the cat")
    assert outcome.code == 0
    assert "the model is not streamed: prompt must be null" in " ".join(outcome.err.split())
    assert "disk, beside the computing" not in outcome.out


def test_plan_counts_two_blocks_of_a_streamed_model(fasp, tiny_folder) -> None:
    plan = ["plan", "--model.name_or_path", tiny_folder("llama-gqa"), "--pruning.own_text", "null", "--device", "cpu"]
    assert "weights: a block, and the next one" in fasp(*plan, "--stream", "true").out
    assert "reloaded copy, to verify what was saved" in fasp(*plan).out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--output_dir", "null"], "output_dir must be a folder for stream=true"),
        (["--prompt", "the cat"], "prompt must be null for stream=true"),
        (["--pruning.score", "learned"], "got 'learned'"),
        (["--pruning.own_text", "{share: 1}"], "own_text.share must be less than 1"),
    ],
)
def test_what_needs_the_whole_model_is_refused(prune, tiny_folder, tmp_path: Path, options, named: str) -> None:
    outcome = prune(tiny_folder("llama-gqa"), "--stream", "true", "--evaluation", "[]", *options)
    assert outcome.code == 2
    assert named in " ".join(outcome.err.split())
    assert not list(tmp_path.glob(".*"))
