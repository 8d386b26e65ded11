"""The examples run, on tiny models."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fasp_lightning
from fasp_lightning import load_pruned
from fasp_lightning.structure import registry
from fasp_lightning.structure.plan import plan_of
from fasp_lightning.training import data

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeded: None) -> None:
    """Few threads, and caches and outputs in a temporary folder."""
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "default_cache", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def example(
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """``example("own_loop", …)`` runs the script on a tiny model and returns what it printed."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"document {number} says {'so ' * (number % 7 + 20)}{number}." for number in range(600))
    )

    def run(name: str, *argv: object) -> str:
        options = [
            "--model",
            tiny_folder("llama"),
            "--text",
            text,
            "--seq_len",
            16,
            "--output",
            tmp_path / "out",
            *argv,
        ]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def kept_ffn(folder: Path) -> int:
    """FFN units that are left of 48 in the first block."""
    return len(plan_of(load_pruned(folder)).blocks[0]["mlp.down_proj"].kept)


def test_prune_and_recover(example: Callable[..., str], tmp_path: Path) -> None:
    out = example("prune_and_recover", "--steps", 6)
    assert [int(step) for step in re.findall(r"EventRecord\(step=(\d+)", out)] == [0, 2, 4]
    assert kept_ffn(tmp_path / "out") < 0.7 * 48
    assert len((EXAMPLES / "prune_and_recover.py").read_text().splitlines()) <= 40


def test_own_lightning_module(example: Callable[..., str], tmp_path: Path) -> None:
    out = example("own_lightning_module", "--steps", 4)
    assert [int(step) for step in re.findall(r"EventRecord\(step=(\d+)", out)] == [0, 2]
    assert kept_ffn(tmp_path / "out") < 0.8 * 48


def test_own_loop(example: Callable[..., str], tmp_path: Path) -> None:
    out = example("own_loop", "--steps", 2, "--sequences", 8)
    perplexities = [float(found) for found in re.findall(r"perplexity ([\d.]+)", out)]
    assert len(perplexities) == 5
    assert perplexities[2] < perplexities[1]  # two steps of training
    assert perplexities[4] < perplexities[3]
    assert kept_ffn(tmp_path / "out") < 0.8 * 48


def test_add_architecture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # the row it adds is for it alone
    runpy.run_path(str(EXAMPLES / "add_architecture.py"), run_name="__main__")
    assert "helium" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: file.name)
def test_public_names_are_imported_from_the_package_itself(file: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    inner = {
        alias.name for line in imports for alias in line.names if (line.module or "").startswith("fasp_lightning.")
    }
    assert not inner & set(fasp_lightning.__all__)
    assert not inner or "benchmarks" in file.parts  # those measure the inside too
