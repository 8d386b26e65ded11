"""Which files a source means."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasp_lightning.errors import FaspError
from fasp_lightning.text.reading.documents import local_documents
from fasp_lightning.text.reading.files import data_set_of, kind_of, listed, local_files, saved_splits


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\na\n")


def names(folder: Path, source: str) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in local_files(f"{folder}/{source}")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("A.TXT", ".txt"),
        ("a.v2.JSONL", ".jsonl"),
        ("a.ndjson", ".jsonl"),
        ("a.csv.gz", ".csv"),
        ("a.Json.ZST", ".json"),
        ("a.tar.gz", None),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("txt", None),
    ],
)
def test_the_suffix_before_that_of_a_compression_is_the_kind(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


def test_what_is_no_data_stands_beside_it(tmp_path: Path) -> None:
    beside = ("LICENSE.txt", "README.md", "sub/readme_zh.txt", "NOTICE.txt", "merges.txt", "tokenizer_config.json")
    hidden = (".cache/x.csv", "__MACOSX/._a.csv", ".ipynb_checkpoints/a.txt")
    made_by_datasets = ("dataset_info.json", "state.json", "cache-0f.arrow")
    make(tmp_path, "a.csv", "sub/b.csv.gz", *beside, *hidden, *made_by_datasets)
    assert names(tmp_path, "") == ["a.csv", "sub/b.csv.gz"]
    assert names(tmp_path, "*") == ["a.csv"]
    assert names(tmp_path, "LICENSE.txt") == ["LICENSE.txt"]
    assert names(tmp_path, "**/README*") == ["README.md"]
    with pytest.raises(
        FileNotFoundError, match=r"but what is no data, 3 files: LICENSE\.txt, NOTICE\.txt, merges\.txt"
    ):
        names(tmp_path, "*.txt")


@pytest.mark.parametrize("source", [".", "*"])
def test_files_of_several_kinds_are_refused_with_the_pattern_that_names_one(source: str, tmp_path: Path) -> None:
    make(tmp_path, "a.csv", "b.csv", "notes.txt", "c.jsonl")
    with pytest.raises(
        FaspError, match=r"\.csv, 2 files: a\.csv, b\.csv; \.jsonl, 1 file: .*such as '(.*)'$"
    ) as caught:
        names(tmp_path, source)
    pattern = str(caught.value).split("'")[-2]
    assert [file.name for file in local_files(pattern)] == ["a.csv", "b.csv"]


def test_the_log_says_which_files_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, *(f"{number}.csv" for number in range(7)), "sub/x.csv", "LICENSE.txt", "sub/more.zip", ".git/x")
    with caplog.at_level("INFO", logger="fasp_lightning"):
        for _ in range(2):
            assert list(local_documents(str(tmp_path), "text", in_pieces=False)) == ["a"] * 8
        list(local_documents(f"{tmp_path}/0.csv", "text", in_pieces=False))
    line = "8 files: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 3 more"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: {line}; not read, 2 files: LICENSE.txt, sub/more.zip"
    ]
    assert listed(local_files(str(tmp_path))) == line


def test_a_saved_data_set_is_its_files_and_its_splits_are_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    DatasetDict(train=rows, test=rows.select([2])).save_to_disk(str(tmp_path / "saved"))
    for split, texts in (("train", ["a", "b", "c"]), ("test", ["c"])):
        assert list(local_documents(f"{tmp_path}/saved/{split}", "text", in_pieces=False)) == texts
        assert data_set_of(local_files(f"{tmp_path}/saved/{split}")[0]) == tmp_path / "saved"
    assert saved_splits(f"{tmp_path}/saved") == ["test", "train"]
    with pytest.raises(FaspError, match="with the splits test, train; set split to one of them"):
        names(tmp_path, "saved")
