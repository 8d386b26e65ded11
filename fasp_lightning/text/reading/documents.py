"""Documents from local files and from the hub, one at a time. ``datasets`` is imported only where it reads."""

from __future__ import annotations

import functools
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.text.reading.chats import Chat, columns_of, document_of
from fasp_lightning.text.reading.files import PLAIN, kind_of, local_files, opened, reading
from fasp_lightning.text.reading.rows import Rows, file_rows

PIECE_LENGTH = 4000
"""Characters, at least, of the pieces into which a file's only document is cut when a split of it is asked for; at most
twice as many."""

LONG = 16
"""Lengths of a piece beyond which one of several documents is cut, too."""

PATIENCE = 1000
"""Rows, at most, that are read of a text of which none has the column."""

_BLANK = re.compile(r"\s")

log = logging.getLogger(__name__)


def local_documents(source: str, column: str, in_pieces: bool) -> Iterator[str]:
    """Yield the documents of local files: their rows, or a .txt or .md file as a whole.

    Args:
        source: A file, a folder or a glob pattern.
        column: Where a row holds its text; see :func:`~fasp_lightning.text.reading.chats.columns_of`.
        in_pieces: Cut a file's only document, and those of a book's length, into pieces of whole lines (of words, where
            a line is long), so that there is something to deal to splits. Chats stay whole.

    Raises:
        FaspFileNotFoundError: If there is no such file.
        FaspError: If a file can't be read as what its suffix says, or its rows lack the column.
    """
    found: Counter[str] = Counter()
    for file in announced_files(source):
        plain = kind_of(file) in PLAIN
        documents = iter([_read(file)] if plain else _texts(_file_rows(file, column), column, str(file), found))
        first = list(islice(documents, 2))
        longest = LONG * PIECE_LENGTH if len(first) > 1 else PIECE_LENGTH
        for document in chain(first, documents):
            if in_pieces and len(document) > longest and not isinstance(document, Chat):
                yield from pieces(document)
            else:
                yield document
    _say_passed(source, found)


def announced_files(source: str) -> list[Path]:
    """The files of :func:`~fasp_lightning.text.reading.files.local_files`; the log says once which are found."""
    files = local_files(source)
    if line := reading(source, files):
        _say(line)
    return files


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
    found: Counter[str] = Counter()
    yield from _texts(_hub_rows(source, subset, split), column, source, found)
    _say_passed(source, found)


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of ``PIECE_LENGTH`` characters or a little more: after a line, else a word, else hard."""
    start = 0
    while start < len(text):
        least, most = start + PIECE_LENGTH, start + 2 * PIECE_LENGTH
        line, word = text.find("\n", least - 1, most), _BLANK.search(text, least - 1, most)
        if line >= 0:
            end = line + 1
        elif word is None or len(text) <= most:
            end = most
        else:
            end = word.end()
        yield text[start:end]
        start = end


def _read(file: Path) -> str:
    """Read one UTF-8 text file."""
    with opened(file) as stream:
        return io.TextIOWrapper(stream, encoding="utf-8-sig").read()


def _file_rows(file: Path, column: str) -> Rows:
    def choose(names: list[str]) -> list[str]:
        return columns_of(names, column) or _refuse_columns(column, str(file), names)

    return file_rows(file, column, choose)


def _texts(rows: Rows, column: str, source: str, found: Counter[str]) -> Iterator[str]:
    """Pick the text out of each row, passing over rows without one, and count both, and chats, in ``found``.

    Rows may differ in their columns, but one of the first ``PATIENCE`` must have those that hold text.
    """
    lacking: dict[str, Any] | None = None
    known = False
    for number, (place, row) in enumerate(rows, start=1):
        known = known or bool(columns_of(row, column))
        lacking = lacking or row
        if not known and number == PATIENCE:
            break
        document = _document(row, column, place, source)
        found["rows"] += 1
        found["passed over"] += document is None
        if isinstance(document, Chat) and not found["chats"]:
            found["chats"] += 1
            columns = ", ".join(columns_of(row, column))
            _say(f"{source}: the tokenizer's chat template makes text of the chats in {columns}")
        if document is not None:
            yield document
    if lacking is not None and not known:
        _refuse_columns(column, source, lacking)


def _say_passed(source: str, found: Counter[str]) -> None:
    if found["passed over"]:
        _say(f"{source}: {found['passed over']:,} of {found['rows']:,} rows have no text and are passed over")


def _document(row: dict[str, Any], column: str, place: str, source: str) -> str | None:
    try:
        return document_of(row, column)
    except FaspError as error:
        raise type(error)(f"{place} of {source!r}: {error}") from None


def _refuse_columns(column: str, source: str, names: Iterable[str]) -> list[str]:
    raise FaspError(f"column {column!r} is not in {source!r}; set column to one of {', '.join(map(str, names))}")


@functools.cache
def _say(line: str) -> None:
    """Log a line, once."""
    log.info(line)


def _hub_rows(source: str, subset: str | None, split: str) -> Rows:
    """Yield all rows of one split of a hub data set: in a DataLoader's worker, ``iter`` would give a share."""
    from datasets import load_dataset

    def refusal(error: Exception) -> FaspError:
        return FaspError(
            f"source {source!r} (subset {subset!r}, split {split!r}) is neither a built-in corpus, nor a "
            f"local file, nor a data set that the hub gave: {one_line(error)}; check the names, or give "
            "a local file"
        )

    with as_refusal(refusal):
        dataset = load_dataset(source, subset, split=split, streaming=True)
        for number, batch in enumerate(dataset.iter(batch_size=1), start=1):
            yield f"row {number}", {column: values[0] for column, values in batch.items()}
