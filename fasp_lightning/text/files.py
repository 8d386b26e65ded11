"""Documents from local files and from the hub, one at a time. ``datasets`` is imported only where it reads."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspFileNotFoundError, as_refusal, one_line

READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
"""Suffix of a text file → name of the ``datasets`` builder (.txt is read without it)."""

PIECE_LENGTH = 4000
"""Characters, at least, of the pieces into which a .txt file is cut when a split of it is asked for."""


def is_local(source: str) -> bool:
    """Tell whether a source means local files: by its suffix, wildcards or start, or because it exists."""
    path = Path(source).expanduser()
    return (
        path.suffix in READERS
        or any(character in source for character in "*?[")
        or source.startswith((".", "/", "~"))
        or path.exists()
    )


def local_files(source: str) -> list[Path]:
    """List the text files that a path, a folder (searched to its bottom) or a glob pattern means, sorted.

    Raises:
        FaspFileNotFoundError: If there is none.
        FaspError: If the one file named has another suffix than those of ``READERS``.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise FaspError(f"source must be a file ending in {_suffixes()}, got {source!r}; convert it")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
    files = sorted(file for file in found if file.suffix in READERS and file.is_file())
    if not files:
        raise FaspFileNotFoundError(f"source {source!r} names no file ending in {_suffixes()}; check the path")
    return files


def local_documents(source: str, column: str, in_pieces: bool) -> Iterator[str]:
    """Yield the documents of local files: the rows of a .jsonl or .parquet file, or a .txt file as a whole.

    Args:
        source: A file, a folder or a glob pattern.
        column: Where a row holds its text.
        in_pieces: Cut .txt files into pieces of whole lines, so that there is something to deal to splits.

    Raises:
        FaspFileNotFoundError: If there is no such file.
        FaspError: If a file can't be read as what its suffix says, or its rows lack the column.
    """
    for file in local_files(source):
        if file.suffix != ".txt":
            yield from _texts(_file_rows(file), column, str(file))
        elif in_pieces:
            yield from _cut_at_lines(file)
        else:
            yield _read(file)


def hub_documents(source: str, subset: str | None, split: str | None, column: str) -> Iterator[str]:
    """Yield the documents of a data set on the hub, downloading no more than is read.

    Args:
        source: The data set's id.
        subset: Its configuration, if it has several.
        split: Its split.
        column: Where a row holds its text.

    Raises:
        FaspError: If the data set, the configuration, the split or the column isn't there, or the hub isn't
            reached.
    """
    if split is None:
        raise FaspError(f"split must name a split of the hub's {source!r}, for example train, got None")
    yield from _texts(_hub_rows(source, subset, split), column, source)


def _suffixes() -> str:
    return ", ".join(READERS)


def _read(file: Path) -> str:
    """Read one UTF-8 text file."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FaspError(f"source {str(file)!r} is not UTF-8 text ({error}); convert it to UTF-8") from error


def _cut_at_lines(file: Path) -> Iterator[str]:
    """Cut a .txt file at line ends into pieces of ``PIECE_LENGTH`` characters or a little more."""
    piece: list[str] = []
    length = 0
    for line in _read(file).splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= PIECE_LENGTH:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _texts(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    """Pick the text out of each row, passing over rows without one."""
    for row in rows:
        if column not in row:
            raise FaspError(f"column {column!r} is not in {source!r}; set column to one of {', '.join(row)}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise FaspError(f"column {column!r} of {source!r} must hold text, got {type(text).__name__}")
        if text is not None:
            yield text


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one .jsonl or .parquet file."""
    from datasets import load_dataset

    if file.stat().st_size == 0:  # ``datasets`` ends in a bare StopIteration on an empty file
        return

    def refusal(error: Exception) -> FaspError:
        fault = _fault(file) or one_line(error)
        return FaspError(f"source {str(file)!r} is corrupt: {fault}; repair or remove it")

    with as_refusal(refusal):
        yield from _rows(load_dataset(READERS[file.suffix], data_files=str(file), split="train", streaming=True))


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set, all of them also in a DataLoader's worker, where ``iter`` would give a share."""
    for batch in dataset.iter(batch_size=1):
        yield {column: values[0] for column, values in batch.items()}


def _fault(file: Path) -> str | None:
    """Describe the first line of a .jsonl file that isn't a JSON object; ``datasets`` counts within chunks."""
    if file.suffix != ".jsonl":
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
            except ValueError as error:  # of the syntax, or of the encoding
                return f"line {number} is not JSON ({error})"
    return None


def _hub_rows(source: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split of a hub data set."""
    from datasets import load_dataset

    def refusal(error: Exception) -> FaspError:
        return FaspError(
            f"source {source!r} (subset {subset!r}, split {split!r}) is neither a built-in corpus, nor a "
            f"local file, nor a data set that the hub gave: {one_line(error)}; check the names, or give "
            "a local file"
        )

    with as_refusal(refusal):
        yield from _rows(load_dataset(source, subset, split=split, streaming=True))
