"""The rows of a file, one at a time, and of each no more than the columns that hold its text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fasp_lightning.text.reading.chats import columns_of
from fasp_lightning.text.reading.files import corrupt, kind_of, opened, refusing

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Place of a row in its file, for messages, and the row."""

Choice = Callable[[list[str]], list[str]]
"""Names of a file's columns → those to read; refuses a file that lacks them."""

_MARK = "\ufeff".encode()
_ROWS_AT_ONCE = 64
_FIELD_LIMIT = 2**31 - 1


def file_rows(file: Path, column: str, choose: Choice) -> Rows:
    """Yield the rows of a file.

    Args:
        file: Its suffix says how it is read.
        column: What an entry of a JSON list that is no object is the value of.
        choose: Chooses the columns of a file that names them once for all rows; rows of JSON have all of theirs.

    Raises:
        FaspError: If the file is not what its suffix says.
        FaspOSError: If it cannot be read.
    """
    if file.stat().st_size == 0:
        return iter(())
    kind = kind_of(file)
    if kind in (".jsonl", ".json"):
        return _lines_of_json(file) if _has_lines(file) else _list_of_json(file, column)
    if kind in (".csv", ".tsv"):
        return _separated(file, choose, "\t" if kind == ".tsv" else None)
    return _columns(file, choose, kind == ".parquet")


def _lines_of_json(file: Path) -> Rows:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.removeprefix(_MARK).strip():
                yield f"line {number}", _object(file, number, line)


def _object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = _parsed(line)
    except (ValueError, RecursionError) as error:  # of the syntax, or of the encoding
        cut = "" if line.endswith(b"\n") else ", the last one: the file may be cut off"
        raise corrupt(file, f"line {number} is not JSON ({error}){cut}") from None
    if not isinstance(row, dict):
        raise corrupt(file, f"line {number} is not a JSON object")
    return row


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # a number of more digits than ``int`` takes, in whatever column
        return json.loads(content.decode("utf-8-sig"), parse_int=float)


def _has_lines(file: Path) -> bool:
    """Whether a file has an object a line, which some writers name .json, or one list, which others name .jsonl."""
    with opened(file) as lines:
        first, second = islice(chain((line for line in lines if line.strip()), (b"", b"")), 2)
    if kind_of(file) == ".jsonl":
        return not first.removeprefix(_MARK).lstrip().startswith(b"[")
    try:
        return bool(second) and isinstance(_parsed(first), dict)
    except (ValueError, RecursionError):
        return False


def _list_of_json(file: Path, column: str) -> Rows:
    """Rows of a list, of the one list in an object, or the one row that the object is."""
    with opened(file) as stream:
        content = stream.read()
    try:
        whole = _parsed(content.strip() or b"[]")
    except (ValueError, RecursionError) as error:
        raise corrupt(file, f"it is not JSON ({error})") from None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 and not columns_of(whole, column) else [whole]
    if not isinstance(whole, list):
        raise corrupt(file, f"it must hold a list of rows, got {type(whole).__name__}")
    for number, entry in enumerate(whole, start=1):
        yield f"entry {number}", entry if isinstance(entry, dict) else {column: entry}


def _separated(file: Path, choose: Choice, delimiter: str | None) -> Rows:
    """Rows of separated values; those of a .csv are by what its header has most of: commas, semicolons or tabs."""
    csv.field_size_limit(_FIELD_LIMIT)  # a document is longer than the 128 KiB that a field may have
    with opened(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        header = lines.readline()
        delimiter = delimiter or max(",;\t", key=header.count)
        reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
        start = 1
        try:
            names = next((fields for fields in reader if fields), [])
            chosen = [(name, names.index(name)) for name in choose(names)] if names else []
            start = reader.line_num + 1
            for fields in reader:
                if any(fields[len(names) :]):  # a comma at the end of each row adds an empty one
                    raise corrupt(
                        file,
                        f"the row of line {start} has {len(fields)} fields, and the header {len(names)} (put text "
                        f"that has {delimiter!r} into double quotes)",
                    )
                if fields:
                    yield f"line {start}", {name: fields[at] if at < len(fields) else None for name, at in chosen}
                start = reader.line_num + 1
        except csv.Error as error:
            raise corrupt(file, f"the row of line {start} is not CSV ({error})") from None


def _columns(file: Path, choose: Choice, parquet: bool) -> Rows:
    number = 0
    with refusing(file):
        for batch in (_parquet_batches if parquet else _arrow_batches)(file, choose):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield f"row {number}", row


def _parquet_batches(file: Path, choose: Choice) -> Iterator[Any]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(file) as found:
        yield from found.iter_batches(batch_size=1024, columns=choose(found.schema_arrow.names))


def _arrow_batches(file: Path, choose: Choice) -> Iterator[Any]:
    """Batches of an .arrow file in either of its two formats: ``datasets`` writes streams, others files."""
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            source.seek(0)
            table = ipc.open_stream(source)
            batches = iter(table)
        columns = choose(table.schema.names)
        for batch in batches:
            yield batch.select(columns)
