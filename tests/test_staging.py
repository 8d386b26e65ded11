"""Writing beside and renaming: whatever is killed at whatever moment, something whole stands there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fasp_lightning import staging, writers
from fasp_lightning.staging import clear_left, fingerprint, place, read_json, staged, write_beside, write_json

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(staging.__file__).parents[1])}

KILLED = """
import os, signal, sys
from pathlib import Path
from fasp_lightning import staging, writers

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *arguments: (function(*arguments), kill())

path = Path({path!r})
"""

FOLDER = """
with staging.staged(path) as stage:
    (stage / "content").write_text("new")
    {inside}
"""

AFTER = "after the renames"
POINTS = {
    "while it is written": ("", "kill()"),
    "before it is on the disk": ("staging._flush_folder = kill", ""),
    "before the renames": ("staging._replace = kill", ""),
    "between the renames": ("Path.rename = after(Path.rename)", ""),
    AFTER: ("staging._remove = kill", ""),
}
"""When a process is killed → what makes it so."""


def run(code: str) -> None:
    """Run code that kills its process."""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def killed_at(point: str, path: Path) -> None:
    """Have a process killed while it replaces a folder."""
    before, inside = POINTS[point]
    run(KILLED.format(path=str(path)) + before + FOLDER.format(inside=inside))


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "content").write_text(content)
    return path


def beside(path: Path) -> list[str]:
    """What stands in the same folder."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


def failing(path: Path) -> None:
    """Begin to replace a folder, which clears what was left, and fail."""
    with pytest.raises(RuntimeError, match="enough"), staged(path):
        raise RuntimeError("enough")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("clear", [failing, clear_left], ids=["by the next writer", "by itself"])
def test_a_kill_loses_nothing_and_what_it_left_is_cleared(
    point: str, clear: Callable[[Path], None], tmp_path: Path
) -> None:
    path = folder(tmp_path / "model", "old")
    killed_at(point, path)
    assert len(beside(path)) == (2 if point == "between the renames" else 1)
    clear(path)
    assert (path / "content").read_text() == ("new" if point == AFTER else "old")
    assert beside(path) == []


@pytest.mark.parametrize("point", POINTS)
def test_the_next_writer_succeeds_after_a_kill(point: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "old")
    killed_at(point, path)
    with staged(path) as stage:
        (stage / "content").write_text("newest")
    assert (path / "content").read_text() == "newest"
    assert beside(path) == []


@pytest.mark.parametrize("when", ["staging._flush = kill", "Path.replace = kill"])
def test_a_file_is_the_old_one_until_it_is_whole(when: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(b"old")
    run(KILLED.format(path=str(file)) + f"{when}\nstaging.write_beside(path, b'new')")
    assert file.read_bytes() == b"old"
    assert len(beside(file)) == 1
    write_beside(file, b"newest")
    assert file.read_bytes() == b"newest"
    assert beside(file) == []


@pytest.mark.parametrize("when", ["staging._flush_folder = kill", "staging._give_way = kill"])
def test_a_kill_leaves_no_half_of_what_is_placed(when: str, tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "entry"
    writing = "staging.place(path, lambda part: (part / 'content').write_text('x'))"
    run(KILLED.format(path=str(entry)) + f"{when}\n{writing}")
    assert not entry.exists()
    assert len(beside(entry)) == 1
    place(entry, lambda part: (part / "content").write_text("whole"))
    assert (entry / "content").read_text() == "whole"
    assert beside(entry) == []


HOLDING = """
import sys
from pathlib import Path
from fasp_lightning.staging import staged
with staged(Path({path!r}), replace={replace}) as stage:
    (stage / "content").write_text("second")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Callable[[bool], subprocess.Popen]]:
    """Starts a process that is writing the folder ``tmp_path / "model"`` until it reads a line."""
    started = []

    def start(replace: bool) -> subprocess.Popen:
        code = HOLDING.format(path=str(tmp_path / "model"), replace=replace)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, **pipes)
        assert process.stdout.readline() == "writing\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("replace", "last"), [(True, "second"), (False, "first")])
def test_a_second_writer_that_lives_is_left_alone(replace: bool, last: str, another, tmp_path: Path) -> None:
    process, path = another(replace), tmp_path / "model"
    with staged(path) as stage:
        (stage / "content").write_text("first")
    clear_left(path)
    assert (path / "content").read_text() == "first"
    assert len(beside(path)) == 1
    process.communicate("\n")
    assert process.returncode == 0
    assert (path / "content").read_text() == last
    assert beside(path) == []


def test_two_stages_of_one_process_do_not_clear_each_other(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with staged(path) as outer:
        (outer / "content").write_text("outer")
        with staged(path) as inner:
            (inner / "content").write_text("inner")
        assert (path / "content").read_text() == "inner"
    assert (path / "content").read_text() == "outer"
    assert beside(path) == []


def left(path: Path, host: str, process: int) -> Path:
    return folder(path.with_name(f".{path.name}.{host}.{process}.0123abcd.new"), "left")


def test_what_a_process_of_the_same_number_left_is_cleared(tmp_path: Path) -> None:
    """A restarted container counts its processes from 1 again."""
    left(tmp_path / "model", writers.host(), os.getpid())
    clear_left(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "stays"), [(0, True), (writers.ABANDONED_AFTER + 60, False)])
def test_another_machines_work_is_cleared_when_it_stands_still(seconds: float, stays: bool, tmp_path: Path) -> None:
    stage = left(tmp_path / "model", "0" * 8, 1)
    for one in (stage / "content", stage):
        os.utime(one, (one.stat().st_atime, one.stat().st_mtime - seconds))
    clear_left(tmp_path / "model")
    assert stage.exists() is stays


OTHERWISE = [".model.notes.new", ".model.tar.0a.1.0b.new", "model.0a.1.0b.new", ".model.0a.1.0b.bak"]


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_named_otherwise_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    failing(tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_first_of_several_that_place_wins(tmp_path: Path) -> None:
    entry = tmp_path / "entry"

    def slow(part: Path) -> None:
        (part / "content").write_text("slow")
        place(entry, lambda other: (other / "content").write_text("fast"))

    place(entry, slow)
    assert (entry / "content").read_text() == "fast"
    assert beside(entry) == []


def test_everything_is_on_the_disk_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("rename"), rename(self, target))[1])
    with staged(folder(tmp_path / "model", "old")) as stage:
        (stage / "sub").mkdir()
        for name in ("a", "sub/b"):
            (stage / name).write_text(name)
    # two files, their two folders; then the names in the parent folder
    assert order == ["fsync"] * 4 + ["rename"] * 2 + ["fsync"]


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="Input/output"):
        write_beside(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert beside(tmp_path / "file") == []


def test_an_overtaken_writer_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = folder(tmp_path / "model", "old"), Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            folder(path, "other")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(OSError, match="not empty"), staged(path) as stage:
        (stage / "content").write_text("new")
    assert (path / "content").read_text() == "other"
    assert beside(path) == []


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    target = folder(tmp_path / "elsewhere", "kept")
    (tmp_path / "model").symlink_to(target, target_is_directory=True)
    with staged(tmp_path / "model") as stage:
        (stage / "content").write_text("new")
    assert (tmp_path / "model" / "content").read_text() == "new"
    assert (target / "content").read_text() == "kept"
    assert beside(tmp_path / "model") == ["elsewhere"]


def test_a_fingerprint_is_fixed_for_ever() -> None:
    """Another one would make every cached text and every sample of own text unused."""
    assert fingerprint(1, "a", {"b": [None, 0.5], "a": True}) == "9b1c198eeb68a0d2019405da7285e744"


def test_a_fingerprint_depends_on_the_parts_alone() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    found = [fingerprint(), fingerprint(1), fingerprint("1"), fingerprint(1, 1), fingerprint([1, 1]), fingerprint(None)]
    assert len(set(found)) == len(found)
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint(object())


def test_a_mapping_is_read_as_it_was_written(tmp_path: Path) -> None:
    mapping = {"b": [1, None], "c": "Grüße"}
    write_json(tmp_path / "a.json", mapping)
    assert read_json(tmp_path / "a.json") == mapping


@pytest.mark.parametrize(("content", "message"), [("{", "must be JSON"), ("[1]", "must hold a mapping, got list")])
def test_json_of_another_kind_names_its_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/a\.json {message}"):
        read_json(tmp_path / "a.json")
