"""A model in training is written as it is, adapters merged, and trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, calibration
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, load_pruned
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.training.modeling.export import check_export, export_model
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora

NOTHING = Cuts(frozenset(), uneven=False)


def adapted(pruned: bool) -> Any:
    """A tiny llama with adapters that do something."""
    model = tiny_model("llama")
    if pruned:
        FASPPruner(BOTH).prune(model, calibration())
    attach_lora(model, LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_adapters_are_merged_in_the_folder_and_stay_in_the_model(pruned: bool, tmp_path: Path) -> None:
    model = adapted(pruned)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert export_model(model, tmp_path / "out") == tmp_path / "out"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge_lora(model)
    load = load_pruned if pruned else AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=random_tokens()).logits for one in (load(tmp_path / "out"), model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["compact", "zero_filled"])
def test_dense_model_has_the_stock_form_alone(form: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="form must be 'auto' or 'stock' for a model that was never pruned"):
        export_model(tiny_model("llama"), tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = tiny_model("llama")
    for overwrite, reason in ((False, "must be empty"), (True, "holds no pruned model .* and is not overwritten")):
        with pytest.raises(FileExistsError, match=reason):
            check_export(model, tmp_path, "auto", overwrite, NOTHING)
        with pytest.raises(FileExistsError, match=reason):
            export_model(model, tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_form_is_checked_against_what_will_be_cut(tmp_path: Path) -> None:
    model = tiny_model("llama")
    check_export(model, tmp_path / "out", "stock", False, Cuts(frozenset({"ffn"}), uneven=False))
    with pytest.raises(ValueError, match="form 'stock' cannot hold this model"):
        check_export(model, tmp_path / "out", "stock", False, Cuts(frozenset({"ffn"}), uneven=True))
    assert not (tmp_path / "out").exists()
