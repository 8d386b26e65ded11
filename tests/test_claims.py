"""A job of hours keeps the place that it will write: a second one that wants it is refused at its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasp_lightning import staging
from fasp_lightning.staging import claimed, require_unclaimed, staged


def beside(path: Path) -> list[str]:
    """What stands in the same folder."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


CLAIMING = """
import sys
from pathlib import Path
from fasp_lightning.staging import claimed
with claimed(Path({path!r})):
    print("claimed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("clock", [None, 1.0], ids=["fine", "coarse"])
def test_a_place_is_claimed_by_one_job_that_lives(
    clock: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both claims seem to be of one moment: file systems count time in steps of milliseconds."""
    if clock is not None:
        monkeypatch.setattr(staging, "last_change", lambda _: clock)
    path = tmp_path / "model"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    code = CLAIMING.format(path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "claimed\n"
        for _ in range(2):  # what is refused takes the other one's claim away no more than it leaves its own
            with pytest.raises(FileExistsError, match=rf"one job at a time, and process {other.pid} is at it"):
                claimed(path).__enter__()
        other.kill()
        other.wait()
        require_unclaimed(path)  # nor does a killed one stand in the way of what only looks
        assert beside(path) == []
    with claimed(path), claimed(path):  # a process does not stand in its own way
        assert len(beside(path)) == 2
    assert beside(path) == []


def test_a_claim_outlives_what_is_written_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with claimed(path):
        for _ in range(2):
            with staged(path) as stage:
                (stage / "content").write_text("new")
        assert len(beside(path)) == 1
    assert beside(path) == []


def test_a_place_that_may_not_be_written_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="not writable"):
        claimed(tmp_path / "model").__enter__()
