"""One session owns what a run computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_pruning import basic

from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.plan import resolve_pruned


@pytest.mark.parametrize(("asked", "found"), [(None, "cpu"), ("meta", "meta")])
def test_device_is_the_settings_or_the_models(asked: str | None, found: str) -> None:
    session = Session.start(basic(device=asked), resolve_pruned(tiny_model("llama")))
    assert session.device == session.store.device == torch.device(found)


def test_by_default_one_process_computes_alone() -> None:
    session = Session.start(basic(), resolve_pruned(tiny_model("llama")))
    assert session.processes.count == 1
    given = Processes()
    assert Session.start(basic(), resolve_pruned(tiny_model("llama")), processes=given).processes is given


def test_the_store_serves_several_rounds_and_is_empty_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = Session.start(basic(offload="disk"), resolve_pruned(tiny_model("llama")))
    for _ in range(2):
        with session.store as store:
            stored = store.put(torch.ones(3))
            assert torch.equal(store.get(stored), torch.ones(3))
            assert len(list(tmp_path.rglob("*.pt"))) == 1
        assert not list(tmp_path.iterdir())
