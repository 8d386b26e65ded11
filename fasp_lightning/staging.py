"""Writing folders and files so that nothing is lost: beside the old one, then renamed; and plain data as JSON.

Whatever is written stands beside its place until it is whole, as ``.NAME.HOST.PID.MARK.new``, and so does what it takes
the place of for the moment between two renames, as ``.old``. The name says which process writes, and a lock on it that
it lives: what a killed one left is cleared by the next one that writes to the same place, and what a living one is
writing is left alone. A job of hours claims the place that it will write, as ``.claim``: a second one that wants it is
refused at its start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.errors import FaspError, FaspFileExistsError, FaspOSError, FaspPermissionError
from fasp_lightning.writers import last_change, left_beside, lives, locked, stem_of


@contextmanager
def staged(path: Path, replace: bool = True) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place at the end; on an error it goes and ``path`` stays.

    All files are on the disk, not only in its cache, before the first rename. A kill between the two renames leaves
    the old folder beside ``path``, and the next call, or :func:`clear_left`, puts it back.

    Args:
        path: The folder; its parent is made.
        replace: Take the place of a folder that is there; otherwise that one wins, and what was written goes.

    Raises:
        OSError: If it cannot be written, or another process puts its own folder there at the very moment.
    """
    with _beside(path) as names:
        names.new.mkdir()
        with locked(names.new):
            yield names.new
            _flush_folder(names.new)
            if replace:
                _replace(names.new, path, names.old)
            else:
                _give_way(names.new, path)


def place(path: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder appear at once and whole; the first of several processes that write the same wins.

    Args:
        path: The folder.
        write: Fills a new folder, which then becomes ``path``.

    Raises:
        OSError: If it cannot be written.
    """
    with staged(path, replace=False) as stage:
        write(stage)


@contextmanager
def staged_file(file: Path) -> Iterator[Path]:
    """A file beside the old one that takes its place at the end; its folder is made. On an error the old one stays.

    Args:
        file: The file.

    Raises:
        OSError: If it cannot be written.
    """
    with _beside(file) as names:
        names.new.touch()
        with locked(names.new):
            yield names.new
            _flush(names.new)
            names.new.replace(file)
        _flush(file.parent)


def write_beside(file: Path, content: bytes) -> None:
    """Write a file as :func:`staged_file` does.

    Args:
        file: The file.
        content: All of it.

    Raises:
        OSError: If it cannot be written.
    """
    with staged_file(file) as new:
        new.write_bytes(content)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep a place for a job of this process, which will write there at its end.

    Args:
        path: The file or folder.

    Raises:
        FaspPermissionError: If the place is not writable.
        FaspFileExistsError: If another process that lives has claimed it before.
    """
    require_space(path, 0)
    with _beside(path) as names:
        claim = names.new.with_suffix(".claim")
        claim.touch()
        try:
            with locked(claim):
                require_unclaimed(path, claim)
                yield
        finally:
            _remove(claim)


def require_unclaimed(path: Path, claim: Path | None = None) -> None:
    """Refuse a place that another process that lives has claimed, and clear what killed ones left there.

    Args:
        path: The file or folder.
        claim: The claim of the caller, which later ones do not concern; one of the same moment may have been let in.

    Raises:
        FaspFileExistsError: If there is one.
    """
    clear_left(path)
    for other, writer in left_beside(path):
        began = last_change(other) if other.suffix == ".claim" and not writer.here else 0.0
        if not began or (claim and last_change(claim) < began):  # gone, or later than the caller's
            continue
        raise FaspFileExistsError(
            f"{str(path)!r} must be written by one job at a time, and process {writer.process} is at it; choose "
            f"another place, wait for its end, or remove {str(other)!r} if that is no job which lives"
        )


def clear_left(path: Path) -> None:
    """Remove what killed processes left beside a place, and put back an old folder that a kill has taken from it.

    Args:
        path: The file or folder that they were writing.
    """
    dead = [left for left, writer in left_beside(path) if not lives(left, writer)]
    for left in sorted(dead, key=last_change):  # the youngest old folder is the one that stood there last
        if left.suffix == ".old" and not os.path.lexists(path):
            with suppress(OSError):  # another process was faster
                left.rename(path)
        elif left.suffix != ".old" or os.path.lexists(path):
            _remove(left)


def require_space(path: Path, size: int) -> None:
    """Refuse a folder that may not be written, or whose disk has no room for it.

    Args:
        path: The folder; it need not exist.
        size: Bytes that will be written. What is overwritten goes afterwards, so it makes no room.

    Raises:
        FaspPermissionError: If the place is not writable.
        FaspOSError: If the disk has too little room; the message names both sizes.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise FaspPermissionError(
            f"folder {str(path)!r} cannot be made: {str(parent)!r} is not writable; choose another one"
        )
    free = shutil.disk_usage(parent).free
    if size > free:
        raise FaspOSError(
            f"folder {str(path)!r} needs {size / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free; make room, or "
            "choose a folder on another disk"
        )


def write_json(file: Path, data: Any) -> None:
    """Write plain data as one line of JSON."""
    file.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Read a mapping.

    Raises:
        FaspError: If the file holds none; the message names it.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FaspError(f"{file} must be JSON: {error}") from None
    if not isinstance(data, dict):
        raise FaspError(f"{file} must hold a mapping, got {type(data).__name__}")
    return data


def fingerprint(*parts: Any) -> str:
    """Hash plain data: the name of a cached thing after all that decides on it.

    Args:
        parts: Numbers, strings, ``None``, and lists and mappings of them; the order of a mapping does not count.

    Returns:
        32 hex digits, the same on every machine.

    Raises:
        TypeError: If something else is among them.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class _Names(NamedTuple):
    """Where something stands until it is whole, and where what was there stands until that is in its place."""

    new: Path
    old: Path


@contextmanager
def _beside(path: Path) -> Iterator[_Names]:
    """Names beside a place for what this process writes; what still stands under the first one at the end goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_left(path)
    with stem_of(path) as stem:
        names = _Names(path.with_name(f"{stem}.new"), path.with_name(f"{stem}.old"))
        try:
            yield names
        finally:
            _remove(names.new)


def _replace(stage: Path, path: Path, old: Path) -> None:
    """Put a folder into the place of another one."""
    with locked(path) if path.exists() else nullcontext():  # beside its place it is no killed process's
        _swap(stage, path, old)


def _swap(stage: Path, path: Path, old: Path) -> None:
    if path.exists():
        path.rename(old)
    try:
        stage.rename(path)
    except OSError:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        if path.exists():
            _flush(path.parent)  # the renames are on the disk before the old folder goes
            _remove(old)


def _give_way(stage: Path, path: Path) -> None:
    """Put a folder where none is."""
    try:
        stage.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    else:
        _flush(path.parent)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _flush_folder(folder: Path) -> None:
    """Have the disk take all that stands in a folder."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _flush(path)


def _flush(path: Path) -> None:
    """Have the disk take a file, or the names in a folder: a rename may reach it before what was written does."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(handle)
