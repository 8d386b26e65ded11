"""Which files a source means, of what kind they are, and how their bytes are read."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fasp_lightning.errors import FaspError, FaspFileNotFoundError, FaspOSError, as_refusal, one_line

KINDS = {
    ".txt": ".txt",
    ".md": ".md",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".tsv",
    ".parquet": ".parquet",
    ".arrow": ".arrow",
}
"""Suffix of a file, in lower case → what it is read as."""

PLAIN = (".txt", ".md")
"""Kinds without rows: the file is a document."""

SUFFIXES = ", ".join(KINDS)
"""For messages."""

NAMED = 5
"""Names, at most, of the files that are listed."""

_ABOUT = re.compile(
    r"(licen[cs]e|copying|copyright|readme|notices?|authors|changelog|citation|contributing)(?![a-z]).*"
    r"|dataset_(infos?|dict)\.json|state\.json|cache-.*\.arrow"
    r"|(.*_)?config\.json|(tokenizer|special_tokens|added_tokens|fasp_).*\.json|.*\.index\.json"
    r"|vocab\.(json|txt)|merges\.txt",
    re.IGNORECASE,
)
"""Names of files that are no data: what stands beside texts, what ``datasets`` puts there, and a model's own."""


def _zstandard(file: Path) -> IO[bytes]:
    from pyarrow import input_stream  # type: ignore[import-untyped]

    return io.BufferedReader(input_stream(str(file), compression="zstd"))


_OPEN: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
"""Suffix after that of a kind → how the file is opened."""


def kind_of(file: Path) -> str | None:
    """What a file is read as, by its suffix before that of a compression, in any case; ``None`` if it is no text."""
    name = Path(file.name.lower())
    inner = Path(name.stem) if name.suffix in _OPEN else name
    kind = KINDS.get(inner.suffix)
    return None if inner != name and kind in (".parquet", ".arrow") else kind


def is_local(source: str) -> bool:
    """Tell whether a source means local files: by its suffix, wildcards or start, or because it exists."""
    path = Path(source).expanduser()
    return (
        kind_of(path) is not None
        or any(character in source for character in "*?[")
        or source.startswith((".", "/", "~"))
        or path.exists()
    )


def saved_splits(source: str) -> list[str]:
    """Splits of a ``DatasetDict`` that ``save_to_disk`` has put into a folder; none of any other source."""
    about = Path(source).expanduser() / "dataset_dict.json"
    try:
        return sorted(map(str, json.loads(about.read_text(encoding="utf-8"))["splits"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def local_files(source: str) -> list[Path]:
    """List the files of text that a path, a folder (searched to its bottom) or a glob pattern means, sorted.

    In a folder, and among what a pattern finds, neither hidden files count nor those that are no data (LICENSE, README,
    a model's vocabulary and the like), unless the pattern names these.

    Raises:
        FaspFileNotFoundError: If there is none.
        FaspError: If the one file named has another suffix than those of ``KINDS``, those found are of several kinds,
            or the folder is of a data set with splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise FaspError(f"source must be a file ending in {SUFFIXES}, got {source!r}; convert it")
        return [path]
    if splits := saved_splits(source):
        raise FaspError(
            f"source {source!r} is a data set with the splits {', '.join(splits)}; set split to one of them"
        )
    found = sorted(file for file in _candidates(path) if kind_of(file) is not None)
    files = [file for file in found if not _ABOUT.fullmatch(file.name) or _asks_for_about(path)]
    if not files:
        beside = f" but what is no data, {listed(found)}; name one itself to read it" if found else "; check the path"
        raise FaspFileNotFoundError(f"source {source!r} names no file ending in {SUFFIXES}{beside}")
    _require_one_kind(source, files)
    return files


def reading(source: str, files: list[Path]) -> str | None:
    """Say which files of a folder or pattern are read, and which are not; ``None`` where a file itself is named.

    Args:
        source: The folder, pattern or file.
        files: What :func:`local_files` gives.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return None
    left = sorted(set(_candidates(path)) - set(files))
    return f"{source}: {listed(files)}" + (f"; not read, {listed(left)}" if left else "")


def listed(files: list[Path]) -> str:
    """Number and names of files: "3 files: a.csv, b.csv, sub/c.csv"."""
    folder = os.path.commonpath([file.parent for file in files])
    names = [Path(os.path.relpath(file, folder)).as_posix() for file in files[:NAMED]]
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'}: {', '.join(names)}{more}"


def data_set_of(file: Path) -> Path:
    """The folder that the file's data set is in: its own, or that of all splits where ``save_to_disk`` made it."""
    folder = file.resolve().parent
    return folder.parent if folder.name in saved_splits(str(folder.parent)) else folder


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; what a library says of them while they are read is told as a refusal."""
    suffix = file.suffix.lower()
    with refusing(file), _OPEN[suffix if suffix in _OPEN else ""](file) as stream:
        yield stream


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Tell a library's error about a file as a refusal that names the file."""

    def refusal(error: Exception) -> FaspError:
        if isinstance(error, UnicodeDecodeError):
            return FaspError(f"source {str(file)!r} is not UTF-8 text ({error}); convert it to UTF-8")
        if isinstance(error, OSError) and error.errno and error.strerror:
            return FaspOSError(f"source {str(file)!r} cannot be read: {error.strerror}")
        return corrupt(file, one_line(error))

    with as_refusal(refusal):
        yield


def corrupt(file: Path, fault: str) -> FaspError:
    """The refusal of a file that is not what its suffix says."""
    return FaspError(f"source {str(file)!r} is corrupt: {fault}; repair or remove it")


def _candidates(path: Path) -> Iterable[Path]:
    """Files in a folder, hidden ones left out, or that a pattern means."""
    inside = path.is_dir()
    found = path.rglob("*") if inside else map(Path, glob.iglob(str(path), recursive=True))
    for file in found:
        hidden = inside and any(part.startswith((".", "__MACOSX")) for part in file.relative_to(path).parts)
        if not hidden and file.is_file():
            yield file


def _asks_for_about(pattern: Path) -> bool:
    return not pattern.is_dir() and _ABOUT.fullmatch(pattern.name) is not None


def _require_one_kind(source: str, files: list[Path]) -> None:
    """Refuse several kinds of files: which of them are the data cannot be told."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(str(kind_of(file)), []).append(file)
    if len(kinds) == 1:
        return
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    folder = source.rstrip("/") if Path(source).expanduser().is_dir() else os.path.dirname(source)
    pattern = f"{folder}/**/*{most}" if folder else f"**/*{most}"
    found = "; ".join(f"{kind}, {listed(kinds[kind])}" for kind in sorted(kinds))
    raise FaspError(
        f"source {source!r} must mean files of one kind, got {found}; name one kind by a pattern, such as {pattern!r}"
    )
