"""Writing folders and files so that nothing is lost: beside the old one, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspOSError, FaspPermissionError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place at the end; on an error it goes and ``path`` stays.

    What an earlier process left there when it was killed is removed. A kill between the two renames leaves the
    old folder beside ``path``, as ``.NAME.….old``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.suffix == ".new":
            shutil.rmtree(left, ignore_errors=True)
    mark = uuid.uuid4().hex[:8]
    stage, old = path.with_name(f".{path.name}.{mark}.new"), path.with_name(f".{path.name}.{mark}.old")
    stage.mkdir()
    try:
        yield stage
        _replace(stage, path, old)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(stage: Path, path: Path, old: Path) -> None:
    if path.exists():
        path.rename(old)
    try:
        stage.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_beside(file: Path, content: bytes) -> None:
    """Write a file beside the old one, and rename it; its folder is made. On an error the old one stays.

    Args:
        file: The file.
        content: All of it.

    Raises:
        OSError: If it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stage = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        stage.write_bytes(content)
        stage.replace(file)
    finally:
        stage.unlink(missing_ok=True)


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


def place(entry: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder appear at once and whole, whatever kills the writing and whoever else writes the same.

    Args:
        entry: The folder.
        write: Fills a new folder, which then becomes `entry`.
    """
    part = entry.with_name(f"{entry.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        write(part)
        part.rename(entry)
    except OSError:
        if not entry.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
