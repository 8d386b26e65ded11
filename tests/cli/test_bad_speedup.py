"""Speed-ups that are refused: one line, before any weight is read and anything is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasp_lightning.pruning.latency import speedup


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--speedup", "1"), "speedup must be a number above 1, such as 1.3, got 1.0"),
        (("--speedup", "fast"), "fast"),
        (("--speedup", "1.2", "--pruning.sparsity", "0.3"), "pruning.sparsity must be left out where speedup is given"),
        (("--speedup", "1.2", "--prompt", "512"), "its length for speedup is serving.prompt"),
        (("--speedup", "1.2", "--serving.prompt", "0"), "serving.prompt must be at least 1, got 0"),
        (("--speedup", "1.2", "--serving.new", "0"), "serving.new must be at least 1, got 0"),
        (("--speedup", "1.2", "--serving.batch", "0"), "serving.batch must be at least 1, got 0"),
        (("--speedup", "1.2", "--serving.phase", "all"), "all"),
        (("--speedup", "1.2", "--serving.prompt", "60"), "serving.new must have at most 64 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_speedup_is_refused(prune, tiny_folder, tmp_path: Path, monkeypatch, options, fragment: str) -> None:
    monkeypatch.setattr(speedup, "_timed", lambda *_: pytest.fail("something was timed"))
    outcome = prune(tiny_folder("opt"), *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("fasp: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert fragment in outcome.err
    assert not (tmp_path / "pruned").exists()


def test_sweep_takes_no_speedup(fasp, tiny_folder) -> None:
    outcome = fasp("sweep", "--model.name_or_path", tiny_folder("llama"), "--speedup", "1.2")
    assert outcome.code == 2
    assert "speedup must be null in a sweep, whose sparsities are given, got 1.2" in outcome.err
