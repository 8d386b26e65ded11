"""Exports in a folder's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasp_lightning.checkpoints.exporting.exported import Exported, LoaderCheck
from fasp_lightning.checkpoints.exporting.record import record_export
from fasp_lightning.checkpoints.publishing import record

CHECK = LoaderCheck("llama.cpp", "b1", 40, 39, 0.5)


def exports_in(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "fasp_report.json").read_text())["exports"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fasp_report.json").write_text('{"sparsity": 0.2}\n')
    return tmp_path


def test_result_of_the_check_is_recorded_beside_what_stood_there(folder: Path) -> None:
    assert record_export(folder, Exported(Path("/of/this/machine/m.gguf"), "gguf", "llama", 7, CHECK))
    (entry,) = exports_in(folder)
    assert entry.pop("date")
    wanted = {"target": "gguf", "architecture": "llama", "file": "m.gguf", "bytes": 7}
    assert entry == wanted | {
        "loader": "llama.cpp",
        "version": "b1",
        "same": 39,
        "tokens": 40,
        "logit_difference": 0.5,
    }
    assert json.loads((folder / "fasp_report.json").read_text())["sparsity"] == 0.2


def test_later_export_of_the_same_name_replaces_the_earlier(folder: Path) -> None:
    for size, name in ((1, "a.gguf"), (2, "b.gguf"), (3, "a.gguf")):
        record_export(folder, Exported(Path(name), "gguf", "llama", size))
    assert [(entry["file"], entry["bytes"]) for entry in exports_in(folder)] == [("b.gguf", 2), ("a.gguf", 3)]


def test_folder_without_a_report_stays_as_it_is(tmp_path: Path) -> None:
    assert not record_export(tmp_path, Exported(Path("a"), "gguf", "llama", 1))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_may_only_be_read_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(record, "write_beside", deny)
    assert not record_export(folder, Exported(Path("a"), "gguf", "llama", 1))
    assert json.loads((folder / "fasp_report.json").read_text()) == {"sparsity": 0.2}
