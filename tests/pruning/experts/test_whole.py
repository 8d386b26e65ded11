"""Whole experts: those least needed go, the router loses their rows, stock code loads the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import MIXTURES, random_tokens, tiny_model
from tiny_experts import called_with, experts_of, many_tokens
from tiny_pruning import basic, calibration
from torch import Tensor
from transformers import AutoModelForCausalLM

from fasp_lightning import FaspError, FASPPruner, load_pruned, save_pruned
from fasp_lightning.structure.resolve import parameter_count

every_family = pytest.mark.parametrize("name", MIXTURES)
CONFIG = basic(0.3, experts="whole")


@every_family
def test_cut_model_equals_one_whose_router_never_chooses_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, masked = tiny_model(name), tiny_model(name)
    report = FASPPruner(CONFIG).prune(cut, calibration())
    assert parameter_count(cut) == report.parameters_after
    gone = [
        sorted(set(range(pair.layout.width)) - set(pair.kept.tolist())) for pair in experts_of(cut) if pair.layout.width
    ]
    assert all(gone)
    tokens = random_tokens(2, 20, seed=5)
    linear = torch.nn.functional.linear

    shut = {id(pair.router.weight): experts for pair, experts in zip(experts_of(masked), gone, strict=True)}

    def closing(inputs: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        outputs = linear(inputs, weight, *rest)
        return outputs.index_fill(-1, torch.tensor(shut.get(id(weight), []), dtype=torch.long), -torch.inf)

    monkeypatch.setattr(torch.nn.functional, "linear", closing)
    expected = masked(tokens, use_cache=False).logits
    monkeypatch.undo()
    torch.testing.assert_close(cut(tokens, use_cache=False).logits, expected, atol=1e-4, rtol=0)


@every_family
def test_stock_code_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    FASPPruner(CONFIG).prune(model, calibration())
    assert save_pruned(model, tmp_path / "pruned").form == "stock"
    tokens = random_tokens(2, 20, seed=5)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    for load in (AutoModelForCausalLM.from_pretrained, load_pruned):
        loaded = load(tmp_path / "pruned").eval()
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)
        assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


def test_those_go_that_give_their_tokens_least() -> None:
    model, original, batches = tiny_model("mixtral"), tiny_model("mixtral"), many_tokens()
    FASPPruner(CONFIG).prune(model, batches)
    before, kept = experts_of(original)[0], experts_of(model)[0].kept.tolist()
    hidden, chosen, weights = called_with(original, before, batches)
    means = []
    for index in range(6):
        token, place = torch.where(chosen == index)
        outputs = before.output(index, before.hidden(index, hidden[token]))
        means.append((weights[token, place] * outputs.norm(dim=1)).mean().item())
    assert kept == sorted(sorted(range(6), key=means.__getitem__)[-len(kept) :])


def test_as_many_experts_stay_as_a_token_is_sent_to() -> None:
    with pytest.raises(FaspError, match="sparsity must be at most"):
        FASPPruner(basic(0.8, experts="whole")).prune(tiny_model("mixtral"), calibration())


@pytest.mark.parametrize(("first", "then"), [("whole", "columns"), ("columns", "whole")])
def test_one_way_does_not_follow_the_other(first: str, then: str) -> None:
    model = tiny_model("mixtral")
    FASPPruner(basic(0.2, experts=first)).prune(model, calibration())
    with pytest.raises(FaspError, match=f"experts='{then}' cannot follow '{first}'"):
        FASPPruner(basic(0.4, experts=then)).prune(model, calibration())


@pytest.mark.parametrize("experts", ["whole", "columns"])
def test_pruned_model_is_pruned_further(experts: str) -> None:
    model = tiny_model("mixtral")
    FASPPruner(basic(0.2, experts=experts)).prune(model, calibration())
    report = FASPPruner(basic(0.45, experts=experts)).prune(model, calibration())
    assert report.sparsity == pytest.approx(0.45, abs=0.1)
    assert parameter_count(model) == report.parameters_after
