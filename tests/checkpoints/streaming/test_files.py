"""Damage of a checkpoint's files is found before anything is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from fasp_lightning import FaspError
from fasp_lightning.checkpoints.loading import load_config
from fasp_lightning.checkpoints.source import resolve_source
from fasp_lightning.checkpoints.streaming.opening import open_streamed

INDEX = "model.safetensors.index.json"


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    shard_of(folder).write_bytes(shard_of(folder).read_bytes()[:-7])


def lose(folder: Path) -> None:
    shard_of(folder).unlink()


def index_with(folder: Path, change: Callable[[str], str]) -> None:
    (folder / INDEX).write_text(change((folder / INDEX).read_text()))


def name_twice(folder: Path) -> None:
    index_with(folder, lambda text: text.replace('"lm_head.weight":', '"lm_head.weight": "other", "lm_head.weight":'))


def name_what_is_not_there(folder: Path) -> None:
    index_with(folder, lambda text: text.replace("lm_head.weight", "lm_head.weighty"))


def name_too_little(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def keep_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


DAMAGE = {
    truncate: "is not a readable safetensors file",
    lose: "which its index lists",
    name_twice: r"must name each weight once, got lm_head\.weight twice",
    name_what_is_not_there: r"must hold lm_head\.weighty in",
    keep_no_index: "to be streamed, got neither",
}


def opened(folder: Path):
    return open_streamed(resolve_source(folder), load_config(folder), torch.float32, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(FaspError, match=DAMAGE[damage]):
        opened(folder)


def test_a_weight_that_is_nowhere_is_refused_when_it_is_asked_for(folder: Path) -> None:
    name_too_little(folder)
    with opened(folder) as streamed, pytest.raises(FaspError, match=r"got none for model\.norm\.weight"):
        streamed.model(torch.ones(1, 4, dtype=torch.long))


def test_what_is_called_is_filled_and_freed(folder: Path) -> None:
    tokens = torch.arange(8)[None]
    with opened(folder) as streamed, torch.no_grad():
        found = streamed.model(tokens).logits
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
        stored = sum(parameter.numel() for parameter in tiny_model("llama").parameters()) * 4
        assert streamed.disk.traffic.read == stored
    assert torch.equal(found, tiny_model("llama")(tokens).logits)
