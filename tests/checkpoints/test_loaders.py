"""The table of loaders holds every family in every form, and says what a trial says."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import TINY
from transformers import AutoModelForCausalLM

from fasp_lightning import load_pruned
from fasp_lightning.checkpoints.exporting.exported import Reference
from fasp_lightning.checkpoints.forms import FORMS, loaders_for, tried_form
from fasp_lightning.checkpoints.loaders import LOADERS, TRIED_FORMS, trial_of, trials
from fasp_lightning.structure.layout import Cuts

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "loaders.py"
CUTS = {
    "stock": Cuts(frozenset({"ffn"})),
    "stock, fewer KV groups": Cuts(frozenset({"ffn", "groups"})),
    "zero_filled": Cuts(frozenset({"ffn", "value"})),
    "compact": Cuts(frozenset({"ffn", "value"}), uneven=True),
    "compact, FFNs alone": Cuts(frozenset({"ffn"}), uneven=True),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that tries the loaders and writes the table."""
    spec = importlib.util.spec_from_file_location("loaders_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TRIED = sorted({tiny.model_type for tiny in TINY.values()})
"""Families with a tiny model; others that share their rows were not tried, and it is said of them."""


def test_each_loader_was_tried_once_with_each_family_in_each_form() -> None:
    found = Counter(
        (family, row.form, loader)
        for row in trials()
        for family in row.families
        for loader in (LOADERS if row.loader == "any" else [row.loader])
    )
    assert set(found) == set(product(TRIED, TRIED_FORMS, LOADERS))
    assert set(found.values()) == {1}


def test_what_was_tried_has_a_version_and_what_failed_a_reason() -> None:
    for row in trials():
        assert row.verdict in ("same", "other", "refused", "no form")
        assert bool(row.version) is (row.loader in LOADERS)
        assert row.why or row.verdict == "same"


@pytest.mark.parametrize("form", TRIED_FORMS)
def test_who_loads_a_saved_model_is_told_with_reason_and_remedy(form: str) -> None:
    assert tried_form(form.partition(",")[0], CUTS[form]) == form
    for family in TRIED:
        if trial_of(family, form, "load_pruned").verdict == "no form":
            continue
        found = loaders_for(form.partition(",")[0], SimpleNamespace(model_type=family), CUTS[form])
        assert [loader.name for loader in found] == list(LOADERS.values())
        assert found[0].ok
        assert all(loader.reason for loader in found)
        assert all(bool(loader.remedy) is not loader.ok for loader in found)


def test_way_out_is_one_that_was_tried() -> None:
    loaders = loaders_for("compact", SimpleNamespace(model_type="llama"), CUTS["compact"])
    remedies = {loader.name: loader.remedy for loader in loaders}
    assert remedies["transformers AutoModelForCausalLM"] == "use fasp_lightning.load_pruned"
    assert remedies["llama.cpp, its own converter"] == "use llama.cpp, fasp export --to gguf"
    assert remedies["vLLM"] == "use vLLM, fasp export --to vllm"


def test_families_that_share_a_row_were_not_tried() -> None:
    loaders = loaders_for("stock", SimpleNamespace(model_type="granite"), Cuts(frozenset({"ffn"})))
    assert {(loader.ok, loader.reason) for loader in loaders} == {(None, "models of type granite were not tried")}


def test_families_of_ones_own_were_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasp_lightning.structure import registry

    monkeypatch.setitem(registry._REGISTRY, "own", registry._LLAMA)
    for form in FORMS:
        loaders = loaders_for(form, SimpleNamespace(model_type="own"), Cuts(frozenset({"ffn"})))
        assert {(loader.ok, loader.reason) for loader in loaders} == {(None, "models of type own were not tried")}


def verdicts(script: ModuleType, family: str, form: str, folder: Path, loaders: list[str]) -> dict[str, str]:
    """What a trial of some loaders that are here says now."""
    expected = script.saved(family, form, folder, None)
    if isinstance(expected, str):
        return dict.fromkeys(loaders, "no form")
    known: dict[str, Any] = {
        "load_pruned": lambda *given: script.own(load_pruned, *given),
        "transformers": lambda *given: script.own(AutoModelForCausalLM.from_pretrained, *given),
        "gguf": script.as_gguf,
        "onnx": script.as_onnx,
    }
    made: dict[Path, Reference] = {folder: expected}
    return {name: script.verdict(script.each(known[name], made)[folder], expected)[0] for name in loaders}


def tabled(family: str, form: str, loaders: list[str]) -> dict[str, str]:
    return {name: trial_of(family, form, name).verdict for name in loaders}


@pytest.mark.parametrize(
    ("family", "form"), [("qwen2", "compact, FFNs alone"), ("gemma2", "zero_filled"), ("opt", "stock")]
)
def test_table_says_what_a_trial_says(script: ModuleType, family: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    loaders = ["load_pruned", "transformers", "gguf"]
    assert verdicts(script, family, form, tmp_path / "p", loaders) == tabled(family, form, loaders)


@pytest.mark.laws
@pytest.mark.parametrize("form", TRIED_FORMS)
@pytest.mark.parametrize("family", TRIED)
def test_table_says_what_any_trial_says(script: ModuleType, family: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("onnxruntime")
    loaders = ["load_pruned", "transformers", "gguf", "onnx"]
    assert verdicts(script, family, form, tmp_path / "p", loaders) == tabled(family, form, loaders)
