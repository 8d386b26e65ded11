"""Hidden units of experts: cut as masked, restored, stored as stock code has them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from oracle import best_units, least_squares
from tiny import MIXTURES, random_tokens, tiny_model
from tiny_experts import called_with, closed, experts_of, many_tokens
from tiny_pruning import basic, calibration
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, load_pruned, save_pruned
from fasp_lightning.pruning.budget import chunks
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters, parameter_count

every_family = pytest.mark.parametrize("name", MIXTURES)
CONFIG = basic(0.25)


@every_family
def test_cut_model_equals_masked_model(name: str) -> None:
    cut, original = tiny_model(name), tiny_model(name)
    attention = "value_dims" if spec_for(cut).pairs[0].kind == "value" else "none"
    report = FASPPruner(basic(0.17, restoration="none", attention=attention)).prune(cut, calibration())
    assert "experts" in {pair.kind for pair in report.pairs}
    assert parameter_count(cut) == report.parameters_after
    tokens = random_tokens(2, 20, seed=5)
    masked = closed(copy.deepcopy(original), cut.fasp_plan)
    found, expected = (model(tokens, use_cache=False).logits for model in (cut, masked))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - original(tokens, use_cache=False).logits).abs().max() > 1e-2
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(*(model.generate(tokens, **options) for model in (cut, masked)))


@every_family
def test_sparsity_zero_is_the_identity(name: str) -> None:
    model, original = tiny_model(name), tiny_model(name).state_dict()
    assert FASPPruner(basic(0.0)).prune(model, calibration()).pairs == []
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


@every_family
def test_stock_code_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    FASPPruner(CONFIG).prune(model, calibration())
    saved = save_pruned(model, tmp_path / "pruned")
    assert saved.form == "stock"
    tokens = random_tokens(2, 20, seed=5)
    for load in (AutoModelForCausalLM.from_pretrained, load_pruned):
        loaded = load(tmp_path / "pruned").eval()
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@every_family
def test_sparsity_counts_the_experts(name: str) -> None:
    model = tiny_model(name)
    before, linear = parameter_count(model), linear_parameters(model, spec_for(model))
    report = FASPPruner(basic(0.3)).prune(model, calibration())
    assert report.sparsity == pytest.approx((before - parameter_count(model)) / linear)
    assert report.sparsity == pytest.approx(0.3, abs=0.1)  # steps of eight hidden units in each expert


@every_family
def test_restoration_lowers_the_error(name: str) -> None:
    report = FASPPruner(CONFIG).prune(tiny_model(name), many_tokens())
    for pair in report.pairs:
        assert pair.error_after < pair.error_before


@every_family
def test_each_expert_is_the_least_squares_of_its_weighted_tokens(name: str) -> None:
    """In the first block with experts: those of the cut model are called with what they were measured on."""
    model, original, batches = tiny_model(name), tiny_model(name), many_tokens()
    FASPPruner(CONFIG).prune(model, batches)
    cut, before = experts_of(model)[0], experts_of(original)[0]
    hidden, chosen, weights = called_with(model, cut, batches)
    for index in range(cut.count):
        token, place = torch.where(chosen == index)
        if len(token) < before.expert_columns:
            continue
        given = weights[token, place, None].double()
        inputs, expert = before.hidden(index, hidden[token]).double(), before.expert(index)
        units = best_units(expert.weight.abs().double().sum(0) * (given * inputs).norm(dim=0), 1, 1, cut.expert_columns)
        assert cut.expert(index).kept.tolist() == units
        mean = (given**2 * inputs).sum(0) / (given**2).sum() if before.bias(before.spec.consumer) is not None else 0.0
        wanted = least_squares(given * (inputs - mean), expert.weight.double(), units, 0.1, "original")
        torch.testing.assert_close(cut.expert(index).weight.double(), wanted, atol=2e-4, rtol=1e-3)


def test_chunks_of_experts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = tiny_model("mixtral"), tiny_model("mixtral")
    FASPPruner(basic(0.25, damping="auto")).prune(whole, many_tokens())
    monkeypatch.setattr(chunks, "GRAM_ROOM", 2 * 2 * 12 * 48**2)
    assert chunks.experts_at_once(48, "auto", 6) == 2
    FASPPruner(basic(0.25, damping="auto", offload="disk")).prune(chunked, many_tokens())
    assert whole.fasp_plan == chunked.fasp_plan
    for one, other in zip(whole.parameters(), chunked.parameters(), strict=True):
        assert torch.equal(one, other)


def test_expert_with_few_tokens_is_named_and_no_worse_than_unrestored() -> None:
    few = [random_tokens(1, 30, seed=3)]
    model, original = tiny_model("mixtral"), tiny_model("mixtral")
    with pytest.warns(UserWarning, match="fewer tokens than its 48 hidden units were sent to expert"):
        report = FASPPruner(CONFIG).prune(model, few)
    first, before = experts_of(model)[0], experts_of(original)[0]
    hidden, chosen, weights = called_with(original, before, few)
    counts = torch.bincount(chosen.flatten(), minlength=6)
    assert report.pairs[0].scarce == (counts < 48).nonzero().flatten().tolist()
    for index in range(6):
        token, place = torch.where(chosen == index)
        inputs, weight = before.hidden(index, hidden[token]), weights[token, place, None]
        kept, target = first.expert(index).kept, before.output(index, before.hidden(index, hidden[token]))
        plain = before.parameter(before.spec.consumer)[index][:, kept]
        restored, unrestored = (
            (weight * (inputs[:, kept] @ matrix.T - target)).norm()
            for matrix in (first.parameter(first.spec.consumer)[index], plain)
        )
        assert restored <= unrestored * (1 + 1e-5)
        assert not torch.equal(first.parameter(first.spec.consumer)[index], plain) or not len(token)


def test_padding_enters_no_expert() -> None:
    models = []
    for filler in (7, 8):
        tokens, mask = random_tokens(3, 40, seed=1), torch.ones(3, 40, dtype=torch.long)
        tokens[0, :15], mask[0, :15] = filler, 0
        model = tiny_model("qwen3_moe")
        FASPPruner(CONFIG).prune(model, [{"input_ids": tokens, "attention_mask": mask}])
        models.append(model)
    first, second = models
    assert first.fasp_plan == second.fasp_plan
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@every_family
def test_row_says_whether_stock_code_keeps_packed_sequences_apart(name: str) -> None:
    model, first, second = tiny_model(name), random_tokens(1, 9, seed=1), random_tokens(1, 7, seed=2)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(each, use_cache=False).logits for each in (first, second)], 1)
    assert torch.allclose(packed, apart, atol=1e-4) is spec_for(model).packing
