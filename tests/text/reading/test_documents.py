"""Documents from local files, and from data sets laid out as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasp_lightning.text.reading import documents
from fasp_lightning.text.reading.chats import Chat
from fasp_lightning.text.reading.documents import hub_documents, local_documents
from fasp_lightning.text.reading.files import is_local, local_files

TEXTS = ["first", "second, with Grüße", "third"]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), path)
    return path


def read(source: Path | str, column: str = "text") -> list[str]:
    return list(local_documents(str(source), column, in_pieces=False))


@pytest.mark.parametrize(("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_rows_give_their_column(suffix: str, write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"body": text, "number": number} for number, text in enumerate(TEXTS)]
    assert read(write(tmp_path / f"rows{suffix}", rows), column="body") == TEXTS


@pytest.mark.parametrize(("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_a_missing_column_lists_those_there_are(suffix: str, write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(tmp_path / f"rows{suffix}", [{"body": "a", "number": 1}])
    with pytest.raises(ValueError, match=rf"column 'text' is not in '{file}'.*body, number"):
        read(file)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": 5}])
    with pytest.raises(ValueError, match="must hold text, got int"):
        read(file)


def test_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": None}, {"text": "b"}])
    assert read(file) == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b'{"text": "open\n', r"line 3 is not JSON \("),
        (b"plain words\n", r"line 3 is not JSON \("),
        (b'["text"]\n', "line 3 is not a JSON object"),
        (b'{"text": "\xff"}\n', r"line 3 is not JSON \(.*utf-8"),
    ],
)
def test_a_corrupt_jsonl_names_its_first_bad_line(bad: bytes, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + bad + b'{"text": "b"}\n')
    with pytest.raises(ValueError, match=f"source '{file}' is corrupt: {fault}"):
        read(file)


def test_a_corrupt_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=f"source '{file}' is corrupt"):
        read(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_empty_file_has_no_documents(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    file.touch()
    assert read(file) == []


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a\n\nb\n", encoding="utf-8")
    assert read(file) == ["a\n\nb\n"]


def test_pieces_of_a_txt_file_are_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_LENGTH", 10)
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\nfour\n\nfive\nsix", encoding="utf-8")
    pieces = list(local_documents(str(tmp_path / "text.txt"), "text", in_pieces=True))
    assert pieces == ["one\ntwo\nthree\n", "four\n\nfive\n", "six"]


@pytest.mark.parametrize("spaces", [True, False])
def test_a_long_line_is_cut_at_words_if_there_are_any(spaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_LENGTH", 10)
    text = "short\n" + ("abcdefg " if spaces else "abcdefgh") * 6
    found = list(documents.pieces(text))
    assert "".join(found) == text
    assert all(10 <= len(piece) <= 20 for piece in found[:-1])
    assert all(piece.endswith((" ", "\n")) for piece in found) is spaces


@pytest.mark.parametrize("count", [1, 2])
def test_rows_are_cut_where_the_only_one_or_as_long_as_a_book(count: int, tmp_path: Path) -> None:
    length = documents.PIECE_LENGTH if count == 1 else documents.LONG * documents.PIECE_LENGTH
    for words, cut in ((length // 5, False), (length // 2, True)):
        file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "word " * words}] * count)
        found = list(local_documents(str(file), "text", in_pieces=True))
        assert (len(found) > count) is cut
        assert "".join(found) == "word " * words * count
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"text": [{"role": "user", "content": "word " * length}]}])
    assert len(list(local_documents(str(chats), "text", in_pieces=True))) == 1


def test_a_txt_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ValueError, match=f"'{file}' is not UTF-8 text.*convert"):
        read(file)


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*"])
def test_folders_and_patterns_give_text_files_sorted(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "notes.docx", "README.md", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    found = [file.relative_to(tmp_path).as_posix() for file in local_files(str(tmp_path / pattern))]
    assert found == (["a.txt", "b.txt"] if pattern == "*" else ["a.txt", "b.txt", "sub/c.txt"])


@pytest.mark.parametrize("name", ["missing.txt", "*.jsonl", "missing/"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"names no file ending in \.txt, \.md, \.jsonl, .*check the path"
    ) as caught:
        read(f"{tmp_path}/{name}")
    assert f"{tmp_path}/{name}" in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.docx"
    file.touch()
    with pytest.raises(ValueError, match=rf"ending in \.txt, \.md, .*, \.parquet, \.arrow, got '{file}'"):
        read(file)


def test_a_path_is_told_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    assert all(map(is_local, ["corpus", "a.txt", "far/a.parquet", "./x", "/x", "~/x", "*.jsonl"]))
    assert not any(map(is_local, ["wikitext", "Salesforce/wikitext"]))


@pytest.fixture
def hub_folder(tmp_path: Path) -> str:
    """A data set repository with two configurations of two splits."""
    for name in ("small", "large"):
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [{"text": f"{name} {split} {n}"} for n in range(2)])
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(tmp_path)


@pytest.mark.parametrize("subset", ["small", "large"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_hub_gives_the_subset_and_split_asked_for(subset: str, split: str, hub_folder: str) -> None:
    found = list(hub_documents(hub_folder, subset, split, "text"))
    assert found == [f"{subset} {split} 0", f"{subset} {split} 1"]


def test_hub_gives_chats_too(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}]
    write_jsonl(tmp_path / "train.jsonl", [{"id": "x", "messages": messages}])
    (found,) = hub_documents(str(tmp_path), None, "train", "text")
    assert isinstance(found, Chat)
    assert json.loads(found) == messages


@pytest.mark.parametrize(("subset", "split"), [("tiny", "test"), ("small", "dev"), (None, "test")])
def test_hub_names_a_subset_or_split_that_is_not_there(subset: str | None, split: str, hub_folder: str) -> None:
    with pytest.raises(ValueError, match=rf"subset {subset!r}, split '{split}'.*check the names"):
        list(hub_documents(hub_folder, subset, split, "text"))


def test_hub_needs_a_split(hub_folder: str) -> None:
    with pytest.raises(ValueError, match=r"split must name a split of the hub's .*got None"):
        list(hub_documents(hub_folder, "small", None, "text"))


def test_a_data_set_out_of_reach_is_named() -> None:
    with pytest.raises(ValueError, match=r"source 'nobody/nothing' .* nor a data set that the hub gave"):
        list(hub_documents("nobody/nothing", None, "train", "text"))
