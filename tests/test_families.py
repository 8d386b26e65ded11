"""The table of all causal LMs of transformers is that of the walk."""

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


def table() -> dict[str, tuple[str, str, str]]:
    """Type → how, kinds of pairs, stock forms, as the committed table has them."""
    lines = (ROOT / "examples/benchmarks/results/families.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return {cells[0]: (cells[1], cells[2], cells[3]) for cells in rows[1:]}


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
    found = table()
    assert sum("ffn" in kinds for _, kinds, _ in found.values()) >= WANTED
    assert {name for name, (how, _, _) in found.items() if how == "row"} == set(known_architectures()) | {"gpt-sw3"}
    assert all(how in ("row", "inferred", "refused") and (how == "refused") is not bool(kinds)
               for how, kinds, _ in found.values())  # fmt: skip


@pytest.mark.parametrize("model_type", ["codegen", "mixtral"])
def test_walk_says_what_the_table_says(model_type: str) -> None:
    row = script().walk(model_type)
    assert (row.how, *script()._cells(row)[2:4]) == table()[model_type]


@pytest.mark.laws
@pytest.mark.parametrize("model_type", table())
def test_walk_says_what_the_table_says_of_all(model_type: str) -> None:
    row = script().walk(model_type)
    assert (row.how, *script()._cells(row)[2:4]) == table()[model_type]
