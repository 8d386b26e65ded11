"""The tables of all causal LMs of transformers, and of those inside models that take images, are those of the walk."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fasp_lightning.structure.registry import known_architectures

ROOT = Path(__file__).parents[1]
WANTED = 60
"""Dense types that have to work."""


def tables() -> list[dict[str, tuple[str, str, str]]]:
    """Type → how, kinds of pairs, stock forms, as the committed tables have them: text alone, images and text."""
    found: list[dict[str, tuple[str, str, str]]] = []
    for line in (ROOT / "examples/benchmarks/results/families.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:2] == ["type", "how"]:
            found.append({})
        elif line.startswith("| "):
            found[-1][cells[0]] = cells[1], cells[2], cells[3]
    return found


def script() -> ModuleType:
    """The script that walks."""
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "examples/benchmarks/families/walk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_most_dense_families_work() -> None:
    text, images = tables()
    assert sum("ffn" in kinds for _, kinds, _ in text.values()) >= WANTED
    borrowed = {"gpt-sw3", "moss_transcribe_diarize"}  # the model and the decoder of another type
    assert {name for name, (how, _, _) in text.items() if how == "row"} == set(known_architectures()) | borrowed
    for how, kinds, _ in (text | images).values():
        assert how in ("row", "inferred", "refused")
        assert (how == "refused") is not bool(kinds)


@pytest.mark.parametrize("model_type", ["codegen", "mixtral", "llava"])
def test_walk_says_what_the_tables_say(model_type: str) -> None:
    row = script().walk(model_type)
    assert (row.how, *script()._cells(row)[2:4]) == (tables()[0] | tables()[1])[model_type]


@pytest.mark.laws
@pytest.mark.parametrize("model_type", tables()[0] | tables()[1])
def test_walk_says_what_the_tables_say_of_all(model_type: str) -> None:
    row = script().walk(model_type)
    assert (row.how, *script()._cells(row)[2:4]) == (tables()[0] | tables()[1])[model_type]
