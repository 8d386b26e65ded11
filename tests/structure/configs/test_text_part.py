"""The decoder inside a model that takes images too is pruned as one alone, and the whole is what it was around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import random_tokens
from tiny_multimodal import MULTIMODAL, tiny_multimodal, with_image
from tiny_pruning import basic, calibration
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from fasp_lightning import FASPPruner, apply_plan, load_model, load_pruned, save_pruned, spec_for
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.resolve import find_blocks

FORMS = [("stock", "none"), ("zero_filled", "value_dims"), ("compact", "value_dims")]


def cut(name: str, attention: str = "none") -> PreTrainedModel:
    """One that is cut, not restored."""
    model = tiny_multimodal(name)
    FASPPruner(basic(0.2, attention=attention, restoration="none")).prune(model, calibration(1))
    return model


@torch.no_grad()
def answers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits with text alone, and with an image."""
    return [model(input_ids=random_tokens(), use_cache=False).logits, model(**with_image(model)).logits]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_saved_whole_is_loaded_by_stock_code_and_answers_alike(name: str, tmp_path: Path) -> None:
    model = cut(name)
    assert save_pruned(model, tmp_path / "p").form == "stock"
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "p")
    assert type(stock) is type(model)
    for found, expected in zip(answers(stock), answers(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.laws
@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.parametrize(("form", "attention"), FORMS)
def test_every_form_comes_back_with_its_plan(name: str, form: str, attention: str, tmp_path: Path) -> None:
    model = cut(name, attention)
    save_pruned(model, tmp_path / "p", form=form)
    for loaded in (load_pruned(tmp_path / "p"), load_model(tmp_path / "p")):
        assert loaded.fasp_plan == model.fasp_plan
        for found, expected in zip(answers(loaded), answers(model), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_what_is_not_of_the_decoders_pairs_stays_bit_for_bit(name: str) -> None:
    model, before = cut(name), tiny_multimodal(name).state_dict()
    blocks = f"{spec_for(model).layers}."
    outside = {key: value for key, value in model.state_dict().items() if not key.startswith(blocks)}
    assert any("vision" in key or "visual" in key for key in outside)
    assert all(torch.equal(value, before[key]) for key, value in outside.items())


def test_widths_stand_in_the_config_of_the_decoder() -> None:
    model = cut("llava")
    before = tiny_multimodal("llava").config
    width = resolve_pruned(model)[0][-1].columns
    assert model.config.text_config.intermediate_size == width < before.text_config.intermediate_size
    assert model.config.vision_config.to_dict() == before.vision_config.to_dict()
    assert model.model.language_model.config is model.config.text_config


def test_decoder_is_cut_as_it_is_alone() -> None:
    """The same weights, calibration and settings give the same pruned weights."""
    whole = tiny_multimodal("llava")
    alone = AutoModelForCausalLM.from_config(text_config(whole.config)).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    for model in (whole, alone):
        FASPPruner(basic(0.3)).prune(model, calibration())
    assert whole.fasp_plan == alone.fasp_plan
    for found, expected in zip(find_blocks(whole, spec_for(whole)), find_blocks(alone, spec_for(alone)), strict=True):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=0)
    assert apply_plan(tiny_multimodal("llava"), alone.fasp_plan).fasp_plan == alone.fasp_plan
