"""Tiny models in folders of several files, and what streaming them makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_model

SHARD = "20KB"
"""So that a tiny model has a handful of files, and blocks lie in two of them."""


def saved(tmp_path: Path, name: str = "llama", **options: Any) -> Path:
    """A tiny model in a folder of several files."""
    tiny_model(name, **options).save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
    return tmp_path / "dense"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_folder(found: Path, expected: Path) -> None:
    """Weights bit for bit, and the config with the plan in it."""
    one, other = weights_in(found), weights_in(expected)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()
