"""``fasp export``: what it writes, prints and records, and what it refuses before weights are read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from tiny import tiny_model
from tiny_gguf import byte_level_tokenizer

from fasp_lightning.writers import host


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaMA whose tokenizer a GGUF file can hold."""
    place = tmp_path / "model"
    tiny_model("llama").save_pretrained(place)
    byte_level_tokenizer().save_pretrained(place)
    return place


def test_pruned_folder_is_exported_and_its_report_says_so(fasp, prune, folder: Path, tmp_path: Path) -> None:
    assert prune(folder).code == 0
    file = tmp_path / "m.gguf"
    outcome = fasp("export", "--model", tmp_path / "pruned", "--to", "gguf", "--output", file, "--check", "false")
    assert outcome.code == 0
    assert f"llama-server -m {file}" in outcome.out
    assert "not asked for" in outcome.out
    (entry,) = json.loads((tmp_path / "pruned" / "fasp_report.json").read_text())["exports"]
    assert (entry["target"], entry["file"], entry["bytes"]) == ("gguf", "m.gguf", file.stat().st_size)


def test_dense_model_is_exported_and_nothing_recorded(fasp, folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    options = ["--outtype", "f32", "--check", "false"]
    assert fasp("export", "--model", folder, "--to", "gguf", "--output", tmp_path / "m.gguf", *options).code == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    assert sorted(path.name for path in folder.iterdir()) == before


def refused(fasp, folder: Path, *options: object) -> str:
    outcome = fasp("export", "--model", folder, "--check", "false", *options)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    return outcome.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--to", "tflite"), "to must be one of 'gguf'"),
        (("--to", "gguf", "--outtype", "q2"), "outtype must be one of"),
        (("--to", "gguf", "--dtype", "int3"), "dtype must be"),
    ],
)
def test_refused_before_weights_are_read(fasp, folder: Path, tmp_path: Path, options: tuple[str, ...], told) -> None:
    assert told in refused(fasp, folder, "--output", tmp_path / "m.gguf", *options)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.usefixtures("no_weights")
def test_file_that_is_there_is_refused_before_weights_are_read(fasp, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "must not be there" in refused(fasp, folder, "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert "must be no folder" in refused(fasp, folder, "--to", "gguf", "--output", tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_model_itself_is_no_output(fasp, folder: Path) -> None:
    assert "must not be the model" in refused(fasp, folder, "--to", "gguf", "--output", folder)


def test_failure_half_way_leaves_no_file(fasp, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.export.write", fail)
    assert fasp("export", "--model", folder, "--to", "gguf", "--output", tmp_path / "m.gguf").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def interrupt_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the file is half written."""

    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"GGUF")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.export.write", half)


def interrupt_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while llama.cpp, in its own process, is at work; it hangs until it is ended."""
    run = subprocess.run

    def hanging(*_: object, **options: Any) -> None:
        Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        run([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.export.installed", lambda: "1")
    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.llama_cpp.require_installed", lambda: "1")
    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.llama_cpp.subprocess.run", hanging)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interrupt", [interrupt_writing, interrupt_check])
def test_interrupted_export_leaves_what_was_there(
    fasp, folder: Path, tmp_path: Path, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF of before")
    with monkeypatch.context() as patched:
        interrupt(patched)
        outcome = fasp(
            "export", "--model", folder, "--to", "gguf", "--output", tmp_path / "m.gguf", "--overwrite", "true"
        )
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "fasp: interrupted")
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_claim_of_a_killed_export_does_not_refuse_the_next(fasp, folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    (tmp_path / f".m.gguf.{host()}.{dead.pid}.abcdef01.claim").touch()
    outcome = fasp("export", "--model", folder, "--to", "gguf", "--output", tmp_path / "m.gguf", "--check", "false")
    assert outcome.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]
