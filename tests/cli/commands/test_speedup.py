"""``--speedup`` of ``fasp plan`` and ``fasp prune``, by a clock that counts operations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_clock import counting

from fasp_lightning.pruning.latency import speedup

ASKED = ("--speedup", 1.2, "--serving.prompt", 20, "--serving.new", 4, "--serving.phase", "prefill")


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds are operations."""
    with counting() as clock:
        monkeypatch.setattr(speedup, "WallClock", lambda device: clock)
        yield


def test_plan_finds_the_sparsity(fasp, tiny_folder) -> None:
    outcome = fasp("plan", "--model.name_or_path", tiny_folder("llama"), "--device", "cpu", *ASKED)
    assert (outcome.code, outcome.err) == (0, "")
    assert "speed at batch 1: prefill of 20 tokens, a decode step within the 4 after them" in outcome.out
    assert "mean width" not in outcome.out
    assert re.search(r"prefill .* x 1\.20 │ +x 1\.2\d │ +│", outcome.out)  # asked, predicted, not measured
    sparsity = re.search(r"sparsity of the blocks, (\d+)\.00 % asked", outcome.out)
    assert sparsity is not None
    assert sparsity[1] != "20"


def test_prune_measures_what_was_predicted(prune, tiny_folder, tmp_path: Path) -> None:
    outcome = prune(tiny_folder("llama"), *ASKED, "--evaluation", "[]")
    assert outcome.code == 0, outcome.err
    asked, predicted, found = re.search(r"prefill .* x (1\.20) │ +x (\S+) │ +x (\S+) │", outcome.out).groups()
    assert float(predicted) >= float(asked)
    assert predicted == found  # operations are counted alike in blocks and in models
    report = json.loads((tmp_path / "pruned" / "fasp_report.json").read_text())["speedup"]
    assert report["factor"] == 1.2
    assert report["serving"] == {"prompt": 20, "new": 4, "batch": 1, "phase": "prefill"}
    assert report["measured"]["before"] == pytest.approx(report["predicted"]["before"])
    assert report["measured"]["after"] == pytest.approx(report["predicted"]["after"])


def test_that_adaptive_widths_differ_from_the_timed_ones_is_said(fasp, tiny_folder) -> None:
    command = ("plan", "--model.name_or_path", tiny_folder("llama"), "--device", "cpu", *ASKED)
    out = fasp(*command, "--pruning.allocation", "adaptive").out
    assert "predicted for all blocks at the mean width" in " ".join(out.split())
