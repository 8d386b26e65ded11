"""What a process writes is its own as long as it lives, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasp_lightning import writers
from fasp_lightning.writers import Writer, left_beside, lives, locked, stem_of


@pytest.fixture
def another() -> subprocess.Popen:
    """A process that lives and writes nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def left(folder: Path, process: int, seconds: float = 0.0) -> tuple[Path, Writer]:
    """What a process of this machine has left, so many seconds ago."""
    path = folder / f".model.{writers.host()}.{process}.0123abcd.new"
    path.touch()
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)
    (found,) = left_beside(folder / "model")
    return found


def test_what_is_being_written_is_this_processes(tmp_path: Path) -> None:
    with stem_of(tmp_path / "model") as stem:
        (tmp_path / f"{stem}.new").touch()
        ((path, writer),) = left_beside(tmp_path / "model")
        assert writer.here
        assert lives(path, writer)
    assert not writer.here
    assert not lives(path, writer)


def test_a_lock_counts_where_the_number_of_the_process_is_not_known(tmp_path: Path) -> None:
    """Another container may count its processes apart, and have the same name."""
    path, writer = left(tmp_path, 2**30)
    with locked(path):
        assert lives(path, writer)
    assert not lives(path, writer)


@pytest.mark.parametrize(("seconds", "alive"), [(0.0, True), (writers.GRACE + 60, False)])
def test_a_number_that_was_given_again_is_no_writer(
    seconds: float, alive: bool, tmp_path: Path, another: subprocess.Popen
) -> None:
    assert lives(*left(tmp_path, another.pid, seconds)) is alive


def test_where_there_are_no_locks_the_number_counts(
    tmp_path: Path, another: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "_lock", lambda handle: None)
    path, writer = left(tmp_path, another.pid, writers.GRACE + 60)
    assert lives(path, writer)
    assert not lives(path, writer._replace(process=str(2**30)))
