"""Who writes beside a place: the name of what stands there says it, and a lock on it that its process lives."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a change after which what a process of another machine writes counts as left by a killed one:
whether it lives cannot be seen from here."""

GRACE = 10.0
"""Seconds that pass at most between the making of a file or folder and its lock."""

_writing: set[str] = set()
"""Marks of what this process is writing. A restarted container may give a process the number of the killed one."""


class Writer(NamedTuple):
    """Who has written something, as its name says it.

    Attributes:
        host: The machine.
        process: The process on it.
        mark: What tells it from all else that this process writes.
    """

    host: str
    process: str
    mark: str

    @property
    def here(self) -> bool:
        """Whether this process is writing it."""
        return self.mark in _writing


@contextmanager
def stem_of(path: Path) -> Iterator[str]:
    """The beginning of the names beside a place of what this process writes until the end."""
    mark = uuid.uuid4().hex[:8]
    _writing.add(mark)
    try:
        yield f".{path.name}.{host()}.{os.getpid()}.{mark}"
    finally:
        _writing.discard(mark)


def left_beside(path: Path) -> Iterator[tuple[Path, Writer]]:
    """What stands beside a place, with its writer."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]+)\.(\d+)\.([0-9a-f]+)\.(?:new|old|claim)")
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if match := pattern.fullmatch(left.name):
            yield left, Writer(*match.groups())


def lives(left: Path, writer: Writer) -> bool:
    """Whether the process lives that is writing there, as far as can be seen."""
    held = _held(left)
    if writer.here or held:
        return True
    age = time.time() - last_change(left)
    if writer.host != host() or os.name != "posix":  # elsewhere than on POSIX, signal 0 is no mere question
        return age < ABANDONED_AFTER
    if int(writer.process) == os.getpid() or not _exists(int(writer.process)):
        return False
    return held is None or age < GRACE  # without the lock, it is another process of the same number


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, which ends with this process, however it ends; where there are such locks."""
    handle = _open(path)
    if handle is not None:
        _lock(handle)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _held(path: Path) -> bool | None:
    """Whether a process holds the lock of a file or folder; ``None`` if that cannot be told."""
    handle = _open(path)
    if handle is None:
        return None
    try:
        taken = _lock(handle)
    finally:
        os.close(handle)
    return None if taken is None else not taken


def _open(path: Path) -> int | None:
    with suppress(OSError):  # on other systems than POSIX, a folder cannot be opened
        return os.open(path, os.O_RDONLY)
    return None


def _lock(handle: int) -> bool | None:
    """Take a lock: ``False`` if another one has it, ``None`` if the system or the file system knows none."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # NFS has none for what is open for reading
        return None
    return True


def last_change(left: Path) -> float:
    """When a file or folder, or a file in it, was last changed; 0 if it is gone."""
    inside = (Path(folder, name) for folder, _, names in os.walk(left) for name in names)
    times = [0.0]
    for one in (left, *inside):
        with suppress(OSError):
            times.append(one.lstat().st_mtime)
    return max(times)


def host() -> str:
    """This machine, in characters that any file name may have."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
