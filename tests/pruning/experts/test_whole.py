"""Whole experts: those least needed go, the router loses their rows, stock code loads the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXTURES, random_tokens, tiny_model
from tiny_experts import called_with, closed, experts_of, many_tokens
from tiny_pruning import basic, calibration
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fasp_lightning import FaspError, FASPPruner, load_pruned, save_pruned
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan
from fasp_lightning.structure.resolve import parameter_count

every_family = pytest.mark.parametrize("name", MIXTURES)
CONFIG = basic(0.3, experts="whole")


@torch.no_grad()
def with_choices(model: nn.Module) -> nn.Module:
    """Let what a router adds to its scores, where it does that, be other than zero."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@every_family
def test_cut_model_equals_one_whose_router_never_chooses_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, masked = with_choices(tiny_model(name)), with_choices(tiny_model(name))
    report = FASPPruner(basic(0.3, experts="whole", restoration="none")).prune(cut, calibration())
    assert parameter_count(cut) == report.parameters_after
    closed(masked, PruningPlan(cut.fasp_plan.model_type, tuple(map(without_experts, cut.fasp_plan.blocks))))
    shut: dict[int, Tensor] = {}
    for left, pair in zip(experts_of(cut), experts_of(masked), strict=True):
        gone = torch.ones(left.layout.width, dtype=torch.bool).index_fill(0, left.kept, False).nonzero().squeeze(1)
        assert left.kept.numel() < left.layout.width
        for own, tensor in (*pair.router.named_parameters(), *pair.router.named_buffers()):
            if own != "weight":  # what is added to the scores
                tensor.data.index_fill_(-1, gone, -torch.inf)
        shut[id(pair.router.weight)] = gone
    linear = torch.nn.functional.linear

    def closing(inputs: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        outputs = linear(inputs, weight, *rest)
        return outputs.index_fill(-1, shut[id(weight)], -torch.inf) if id(weight) in shut else outputs

    tokens = random_tokens(2, 20, seed=5)
    monkeypatch.setattr(torch.nn.functional, "linear", closing)
    expected = masked(tokens, use_cache=False).logits
    monkeypatch.undo()
    torch.testing.assert_close(cut(tokens, use_cache=False).logits, expected, atol=1e-4, rtol=0)


def without_experts(block: dict[str, PairPlan]) -> dict[str, PairPlan]:
    """What a plan says of the other pairs of a block."""
    return {path: pair for path, pair in block.items() if pair.layout.kind != "whole_experts"}


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
