"""What is saved comes to the hub whole, what cannot come is refused early, and what fails there is lost nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Hub, fake_hub
from tiny_pruning import pruned

from fasp_lightning import FaspError, SavedModel, load_pruned, save_pruned


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with fake_hub(tmp_path_factory.mktemp("home")) as hub:
        yield hub


def save(folder: Path, repository: str, **options: Any) -> SavedModel:
    return save_pruned(
        pruned("llama"), folder, form="compact", overwrite=True, verify=False, push_to_hub=repository, **options
    )


def test_the_whole_folder_is_uploaded_and_loads_from_there(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/model"] = {"model-00001-of-00002.safetensors": b"stale", "notes.md": b"mine"}
    assert save(tmp_path / "p", "me/model").url == f"{hub.address}/me/model"
    files = {str(file.relative_to(tmp_path / "p")): file.read_bytes() for file in (tmp_path / "p").rglob("*")}
    assert {"README.md", "config.json", "fasp_report.json", "model.safetensors"} <= set(files)
    assert hub.repositories["me/model"] == {**files, "notes.md": b"mine"}  # weights of before are gone
    assert 'load_pruned("me/model")' in files["README.md"].decode()
    assert load_pruned("me/model").fasp_plan == load_pruned(tmp_path / "p").fasp_plan


def test_a_failed_upload_leaves_the_model_and_the_next_one_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.refusing["me/model"] = 507
    with pytest.raises(FaspError) as raised:
        save(tmp_path / "p", "me/model", private=True)
    message = str(raised.value)
    assert f"the model is saved in '{tmp_path / 'p'}', but not uploaded to 'me/model'" in message
    assert f"`hf upload me/model {tmp_path / 'p'} . --private`" in message
    assert load_pruned(tmp_path / "p").fasp_plan
    made = hub.made["me/model"]
    assert made.get("private") or made["visibility"] == "private"  # as older and newer clients ask for it
    hub.refusing.clear()
    save(tmp_path / "p", "me/model", private=True)
    assert "model.safetensors" in hub.repositories["me/model"]
    weights = hashlib.sha256((tmp_path / "p" / "model.safetensors").read_bytes()).hexdigest()
    assert hub.sent.count(weights) == 1


@pytest.mark.parametrize(
    ("token", "message"),
    [("", "needs a token that may write, got none; run `hf auth login`"), ("hf_stale", "does not take an upload")],
)
def test_a_token_that_is_missing_or_refused_is_found_before_anything_is_written(
    token: str, message: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FaspError, match=message):
        save(tmp_path / "p", "me/model")
    assert not list(tmp_path.iterdir())
    assert not hub.made


@pytest.mark.parametrize("name", ["a/b/c", "my model", "", "-x/y", "http://x"])
def test_what_is_no_repository_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FaspError, match="push_to_hub must be the id of a repository"):
        save_pruned(pruned("llama"), tmp_path / "p", push_to_hub=name)
    assert not list(tmp_path.iterdir())


def test_an_upload_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaspError, match="HF_HUB_OFFLINE"):
        save_pruned(pruned("llama"), tmp_path / "p", push_to_hub="me/model")


def test_private_without_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaspError, match="private is for push_to_hub alone"):
        save_pruned(pruned("llama"), tmp_path / "p", private=True)
