"""The examples in the docstrings of the public names run, on tiny models."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_text import words
from torch.utils.data import DataLoader

import fasp_lightning
from fasp_lightning.structure import registry

REQUIRED = (
    "CausalLMDataModule",
    "CausalLMModule",
    "FASPPruner",
    "FASPPruning",
    "PruningSchedule",
    "perplexity",
    "save_pruned",
)
"""Names that a newcomer starts with."""


def example_of(name: str) -> str | None:
    """The code of a public name's ``Example::``; ``None`` if it has none."""
    document = inspect.getdoc(getattr(fasp_lightning, name)) or ""
    found = re.search(r"^Example::\n\n((?:(?:    .*)?\n?)+)", document, re.MULTILINE)
    return None if found is None else textwrap.dedent(found.group(1))


EXAMPLES = {name: code for name in fasp_lightning.__all__ if (code := example_of(name)) is not None}


@pytest.fixture
def namespace(tmp_path: Path, tiny_folder: Callable[..., Path], tiny_tokenizer: Any) -> dict[str, Any]:
    """What the examples take as given."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(words(300, seed=0)))
    rows = [{"input_ids": ids, "labels": ids} for ids in random_tokens(24, 16)]
    return {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer,
        "batches": [random_tokens(2, 16, seed=seed) for seed in range(4)],
        "name": str(tiny_folder("llama")),
        "text_file": str(text),
        "folder": str(tmp_path / "folder"),
        "loader": DataLoader(rows, batch_size=2),
    }


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files go to a temporary folder, and rows that are registered are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    grad = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, namespace: dict[str, Any]) -> None:
    given = dict(namespace)
    exec(compile(EXAMPLES[name], f"{name}.Example", "exec"), namespace)
    assert set(namespace) > set(given)


@pytest.mark.parametrize("name", REQUIRED)
def test_what_newcomers_start_with_has_an_example(name: str) -> None:
    assert name in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_uses_public_names_alone(name: str) -> None:
    assert not re.findall(r"fasp_lightning\.\w", EXAMPLES[name])
    for names in re.findall(r"from fasp_lightning import (.*)", EXAMPLES[name]):
        assert set(names.split(", ")) <= set(fasp_lightning.__all__)
