"""Families without a row: inferred, proved, said, and gone on with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from fasp_lightning import load_pruned, spec_for
from fasp_lightning.structure import registry
from fasp_lightning.structure.inferring.twin import twin

FAMILY = "internlm3"


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a command adds are gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer) -> Path:
    """A model of a family that has no row."""
    twin(AutoConfig.for_model(FAMILY)).save_pretrained(tmp_path / "own")
    tiny_tokenizer.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_unknown_family_is_inferred_proved_said_and_pruned(
    prune, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = prune(folder)
    assert outcome.code == 0
    said = re.sub(r"\s+", " ", outcome.err + outcome.out)
    assert f"{FAMILY} has no row" in said
    assert f"register_architecture('{FAMILY}', ArchitectureSpec('model.layers', (CoupledPair('self_attn.o_proj'" in said
    spec = registry._REGISTRY[FAMILY]
    monkeypatch.delitem(registry._REGISTRY, FAMILY)  # as in another process
    loaded = load_pruned(tmp_path / "pruned")
    assert spec_for(loaded) == spec
    assert all(loaded.fasp_plan.blocks)


def test_plan_proves_when_asked(fasp, tiny_folder) -> None:
    outcome = fasp(
        "plan", "--model.name_or_path", tiny_folder("llama"), "--prove", "true", "--pruning.own_text", "null"
    )
    assert outcome.code == 0
    assert "row of llama, proved on 2 tiny blocks in" in outcome.out
    assert re.search(r"ffn .*masked ≡ cut[\s\S]* stock", outcome.out)
