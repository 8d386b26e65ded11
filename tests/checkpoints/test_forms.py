"""Blocks of different widths: what their config says, and which forms hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import mask_units
from tiny import FFN, TINY, random_tokens, tiny_model
from tiny_pruning import basic, calibration, plan_keeping, uneven
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, apply_plan, load_pruned, save_pruned, spec_for
from fasp_lightning.checkpoints.forms import loaders_for
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.plan import resolve_pruned

REASON = "blocks have different FFN widths"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(), use_cache=False).logits


def ffn_widths(model: nn.Module) -> list[int]:
    """Columns of the FFN consumer of each block, by asking the weights."""
    spec = spec_for(model)
    paths = [f"{spec.layers}.{index}.{spec.pairs[-1].consumer}" for index in range(model.config.num_hidden_layers)]
    return [model.get_submodule(path).weight.shape[0 if spec.transposed else 1] for path in paths]


def stock_of(model: nn.Module, path: Path) -> nn.Module:
    """What is saved there, as transformers load it."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=model.config._attn_implementation)


@pytest.mark.parametrize("family", TINY)
def test_zero_filled_ffns_are_as_wide_as_the_widest(family: str, tmp_path: Path) -> None:
    model = uneven(family)
    assert save_pruned(model, tmp_path / "p").form == "zero_filled"  # what "auto" chooses
    stock = stock_of(model, tmp_path / "p")
    widest = 4 * 32 if family == "bloom" else 40  # Bloom's is fixed in its code
    assert set(ffn_widths(stock)) == {widest}
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-4, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize("form", ["zero_filled", "compact"])
@pytest.mark.parametrize("family", TINY)
def test_different_widths_come_back(family: str, form: str, tmp_path: Path) -> None:
    model = uneven(family)
    save_pruned(model, tmp_path / "p", form=form)
    loaded = load_pruned(tmp_path / "p", attn_implementation=model.config._attn_implementation)
    assert loaded.fasp_plan == model.fasp_plan
    assert ffn_widths(loaded) == [30, *[40] * (len(ffn_widths(loaded)) - 1)]
    assert torch.equal(logits(loaded), logits(model))
    field = spec_for(model).width_field
    assert field is None or getattr(loaded.config, field) == FFN


def test_block_that_is_whole_is_the_widest(tmp_path: Path) -> None:
    model = uneven("llama", 30, FFN)
    save_pruned(model, tmp_path / "p")
    assert ffn_widths(stock_of(model, tmp_path / "p")) == [FFN, FFN]
    assert ffn_widths(load_pruned(tmp_path / "p")) == [30, FFN]


def test_only_stock_shapes_fill_the_folder(tmp_path: Path) -> None:
    model = uneven()
    paths = [save_pruned(model, tmp_path / form, form=form).path for form in ("compact", "zero_filled")]
    compact, filled = ((path / "model.safetensors").stat().st_size for path in paths)
    assert filled - compact == pytest.approx(10 * 3 * 32 * 4, abs=64)  # ten units of block 0


def test_stock_form_of_different_widths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"form 'stock' cannot hold this model: {REASON}.*'compact' or 'zero_filled'"):
        save_pruned(uneven(), tmp_path / "p", form="stock")


def test_config_has_the_original_width_where_blocks_differ() -> None:
    model = uneven("llama", 44)
    assert model.config.intermediate_size == 44
    apply_plan(model, plan_keeping(model, "ffn", 30, 40))
    assert model.config.intermediate_size == FFN
    apply_plan(model, plan_keeping(model, "ffn", 30))
    assert model.config.intermediate_size == 30


def test_saved_config_has_the_widest_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model = uneven()
    for form, width in (("zero_filled", 40), ("compact", FFN)):
        save_pruned(model, tmp_path / form, form=form)
        assert json.loads((tmp_path / form / "config.json").read_text())["intermediate_size"] == width
        assert model.config.intermediate_size == FFN


@pytest.mark.parametrize("form", ["zero_filled", "compact"])
def test_uneven_model_is_pruned_further_to_the_sparsity_that_was_asked(form: str, tmp_path: Path) -> None:
    """The first block has lost more than its share: the other one loses as much less."""
    save_pruned(uneven("llama", 20, 44), tmp_path / "p", form=form)
    model = load_pruned(tmp_path / "p")
    report = FASPPruner(basic(0.25, attention="none")).prune(model, calibration())
    column = 3 * 32 / (4 * 32**2 + 3 * 32 * FFN) / 2
    assert ffn_widths(model)[0] == 20
    assert report.sparsity == pytest.approx(0.25, abs=column / 2)


def test_plans_name_what_a_form_must_hold() -> None:
    assert uneven().fasp_plan.cuts == Cuts(frozenset({"ffn"}), uneven=True)
    assert uneven("llama", FFN, 40).fasp_plan.cuts == Cuts(frozenset({"ffn"}), uneven=True)
    assert uneven("llama", 40).fasp_plan.cuts == Cuts(frozenset({"ffn"}))
    model = tiny_model("llama")
    assert plan_keeping(model, "value", 8, 9).cuts == Cuts(frozenset({"value"}))  # no config knows value dims anyway


@pytest.mark.parametrize(("allocation", "uneven"), [("uniform", False), ("adaptive", True)])
def test_widths_foretell_what_a_form_must_hold(allocation: str, uneven: bool) -> None:
    config = basic(0.2, attention="none", allocation=allocation)
    assert decide_budget(tiny_model("llama"), config).cuts == Cuts(frozenset({"ffn"}), uneven)


def test_loaders_say_how_the_shapes_are_built() -> None:
    llama, bloom = tiny_model("llama").config, tiny_model("bloom").config
    stock = {
        next(found for found in loaders_for(form, config, cuts) if "AutoModel" in found.name).reason.partition("; ")[2]
        for form, config, cuts in (
            ("stock", llama, Cuts(frozenset({"ffn"}))),
            ("zero_filled", llama, Cuts(frozenset({"ffn", "value"}))),
            ("zero_filled", llama, Cuts(frozenset({"ffn"}), uneven=True)),
            ("zero_filled", bloom, Cuts(frozenset({"ffn"}), uneven=True)),
        )
    }
    assert stock == {
        "one FFN width, in config.intermediate_size",
        "original V/O shapes, zeros where dims are gone; one FFN width, in config.intermediate_size",
        "FFNs padded with zeros to the widest, whose width is in config.intermediate_size",
        "original FFN shapes, zeros where units are gone",
    }


@pytest.mark.parametrize("family", TINY)
def test_any_value_dims_of_each_head_can_be_left(family: str, tmp_path: Path) -> None:
    """Free head balance, and another number in each block."""
    cut, masked = tiny_model(family), tiny_model(family)
    width = resolve_pruned(cut)[0][0].layout.width
    plan = plan_keeping(cut, "value", width - 3, width // 2 - 1)
    apply_plan(cut, plan)
    torch.testing.assert_close(logits(cut), logits(mask_units(masked, plan)), atol=1e-4, rtol=0)
    for form in ("zero_filled", "compact"):
        save_pruned(cut, tmp_path / form, form=form)
        attention = {"attn_implementation": cut.config._attn_implementation}
        assert load_pruned(tmp_path / form, **attention).fasp_plan == plan


def test_pairs_of_one_config_field_that_lost_different_parts_are_not_stock(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2")  # its config holds one width for its experts and, twice that, for the shared ones
    FASPPruner(basic(0.2, allocation="block_influence")).prune(model, calibration())
    assert save_pruned(model, tmp_path / "out").form == "zero_filled"
    torch.testing.assert_close(logits(load_pruned(tmp_path / "out")), logits(model))
    torch.testing.assert_close(logits(stock_of(model, tmp_path / "out")), logits(model))


def test_a_model_that_nothing_was_cut_from_loads_as_any_of_its_shapes(tmp_path: Path) -> None:
    model = tiny_model("bloom")  # whose FFN width no config holds, so that it has no stock form once it is cut
    FASPPruner(basic(0.0)).prune(model, calibration())
    saved = save_pruned(model, tmp_path / "out")
    assert (saved.form, {one.name: one.reason for one in saved.loaders}["transformers AutoModelForCausalLM"]) == (
        "stock",
        "same text; original shapes",
    )
    compact = save_pruned(model, tmp_path / "compact", form="compact").loaders
    assert {one.name: one.ok for one in compact}["transformers AutoModelForCausalLM"] is False  # by its architecture
