"""Files of rows: whatever stands beside the text does not matter, and what is broken is named by its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasp_lightning.text.reading.documents import local_documents


def read(file: Path, column: str = "text") -> list[str]:
    return list(local_documents(str(file), column, in_pieces=False))


def written(file: Path, content: bytes | str) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def zstandard(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


CODECS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    """Also a type that changes late, a new key, null alone, numbers beyond JSON's, and one of 5000 digits."""
    rows = [{"text": "a", "when": "2020-01-01", "n": None}, {"n": 1, "text": "b", "when": {"year": [1, {"x": 2}]}}]
    late = '{"text": "c", "n": NaN, "when": -Infinity}\n\n{"text": "d", "n": ' + "7" * 5000 + "}"
    lines = "\n".join(map(json.dumps, rows)) + "\r\n" + late
    assert read(written(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + lines.encode())) == ["a", "b", "c", "d"]


def test_rows_without_the_column_are_passed_over_and_counted(tmp_path: Path, caplog: Any) -> None:
    file = written(tmp_path / "rows.jsonl", '{"title": "x"}\n{"text": "a"}\n{"text": null}\n')
    with caplog.at_level("INFO", logger="fasp_lightning"):
        assert read(file) == ["a"]
    assert "2 of 3 rows have no text and are passed over" in caplog.text


def test_the_column_is_looked_for_in_no_more_than_the_first_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", '{"body": "a"}\n' * 1000 + "no JSON\n")
    with pytest.raises(ValueError, match=r"column 'text' is not in .*; set column to one of body$"):
        read(file)


def test_a_wrong_value_is_named_by_its_line(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"text": 5}\n')
    with pytest.raises(ValueError, match=f"line 3 of '{file}': column 'text' must hold text, got int"):
        read(file)


def test_a_last_line_that_is_cut_off_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2 is not JSON \(.*, the last one: the file may be cut off"):
        read(written(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": "b'))


def test_half_a_character_does_not_stop_a_tokenizer(tmp_path: Path) -> None:
    (text,) = read(written(tmp_path / "rows.jsonl", r'{"text": "a\ud83d b \ud83d\ude00"}'))
    assert text == "a\ufffd b \U0001f600"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        [{"text": "a", "n": 1}, {"text": "b"}],
        {"version": 1, "data": [{"text": "a"}, {"text": "b"}]},
        ["a", "b"],
    ],
    ids=["rows", "data", "texts"],
)
def test_a_list_is_of_rows(content: Any, name: str, tmp_path: Path) -> None:
    if isinstance(content, list) or name.endswith(".json"):
        for indent in (None, 1):
            assert read(written(tmp_path / name, json.dumps(content, indent=indent))) == ["a", "b"]


def test_lines_of_objects_and_a_lone_one_may_be_called_json(tmp_path: Path) -> None:
    assert read(written(tmp_path / "rows.json", '{"text": "a"}\n{"text": "b"}\n')) == ["a", "b"]
    assert read(written(tmp_path / "rows.json", '{"text": "a",\n"n": [{"x": 1}]}')) == ["a"]
    assert read(written(tmp_path / "rows.json", " \n")) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('[{"text": "a"},\n{"text": ]', r"is corrupt: it is not JSON \(.*line 2"),
        ('{"text": "a"}\n{"text": \n', r"is corrupt: line 2 is not JSON"),
        ("5", "it must hold a list of rows, got int"),
        ('{"text": ["a", "b"]}', "entry 1 of .* got list of str"),
        ("[1]", "entry 1 of .* must hold text, got int"),
    ],
)
def test_json_of_another_shape_is_refused(content: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fault):
        read(written(tmp_path / "rows.json", content))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", '\ufeffid,text\r\n1,"a\nb ""q"", c"\r\n\r\n2,d\r\n3\r\n', ['a\nb "q", c', "d"]),
        ("a.csv", "id;text\n1;a, b\n", ["a, b"]),
        ("a.csv", "id,text\n1,a,\n2,b,,\n", ["a", "b"]),
        ("a.tsv", 'text\tn\nHe said "hi", twice\t1\n', ['He said "hi", twice']),
        ("a.csv", "text\n" + "x" * 200_000 + "\n", ["x" * 200_000]),
        ("a.csv", "text\n", []),
        ("a.csv", "\n", []),
    ],
    ids=["quoted", "semicolons", "commas at the end", "tabs", "long", "header", "blank"],
)
def test_separated_values_give_their_column(name: str, content: str, texts: list[str], tmp_path: Path) -> None:
    assert read(written(tmp_path / name, content)) == texts


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("text\na\nhello, world\n", "the row of line 3 has 2 fields, and the header 1 .*double quotes"),
        ('n,text\n1,a\n2,"b\n3,c\n', "the row of line 3 is not CSV"),
        ("hello,there\na,b\n", "column 'text' is not in .*; set column to one of hello, there"),
        ("text\nGrüße\n".encode("latin-1"), "is not UTF-8 text"),
    ],
    ids=["unquoted", "open", "no header", "latin"],
)
def test_broken_separated_values_are_named(content: bytes | str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fault):
        read(written(tmp_path / "a.csv", content))


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"a text\n", "a text\n"),
        ("a.jsonl", b'{"text": "a"}\n', "a"),
        ("a.csv", b"text\na\n", "a"),
        ("a.json", b'[{"text": "a"}]', "a"),
    ],
)
def test_compressed_files_are_read_as_what_is_in_them(
    name: str, content: bytes, text: str, suffix: str, tmp_path: Path
) -> None:
    assert read(written(tmp_path / (name + suffix), CODECS[suffix](content))) == [text]


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_broken_compressed_file_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    whole = CODECS[suffix]("".join(f'{{"text": "{n * n}"}}\n' for n in range(500)).encode())
    for content in (b"not compressed", whole[:-20]):
        file = written(tmp_path / (name + suffix), content)
        with pytest.raises(ValueError, match=f"source '{file}' is corrupt"):
            read(file, column='{"text": "0"}' if name == "a.csv" else "text")


def table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    schema = pyarrow.schema([("text", pyarrow.string()), ("n", pyarrow.list_(pyarrow.int64()))])
    return pyarrow.Table.from_pylist(rows, schema=schema)


def arrow(path: Path, rows: list[dict[str, Any]], stream: bool) -> Path:
    from pyarrow import ipc

    with (ipc.new_stream if stream else ipc.new_file)(str(path), table(rows).schema) as writer:
        writer.write_table(table(rows))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    parquet.write_table(table(rows), path)
    return path


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_columnar_files_are_read_in_every_form_and_without_rows(form: str, tmp_path: Path) -> None:
    def write(rows: list[dict[str, Any]]) -> Path:
        if form == "parquet":
            return parquet(tmp_path / "a.parquet", rows)
        return arrow(tmp_path / "a.arrow", rows, form == "stream")

    assert read(write([{"text": str(number), "n": [number]} for number in range(150)])) == list(map(str, range(150)))
    assert read(write([{"text": None}, {"text": "a"}])) == ["a"]
    file = write([])
    assert read(file) == []
    with pytest.raises(ValueError, match=r"column 'body' is not in .*; set column to one of text, n"):
        read(file, "body")
    written(file, file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"source '{file}' is corrupt"):
        read(file)
