"""Value dims that are turned to their principal basis before they are cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import best_units, consumer_inputs, consumer_weight, mask_units
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, assert_same
from torch import Tensor

from fasp_lightning import FASPPruner
from fasp_lightning.ops.basis import Basis
from fasp_lightning.pruning.value_basis import DAMPING
from fasp_lightning.structure.plan import resolve_pruned

PRINCIPAL = replace(BOTH, sparsity=0.3, value_basis="principal")
PLAIN = replace(PRINCIPAL, restoration="none")
BATCHES = [random_tokens(2, 40, seed=seed) for seed in range(3)]
"""Without padding, which eager attention does not bear in float64."""


def double(name: str) -> Any:
    return tiny_model(name, dtype=torch.float64)


def naive_bases(inputs: Tensor, weight: Tensor, groups: int, repeats: int) -> list[Basis]:
    """By a Cholesky root of the damped gram, and of (query head, dim) numbering."""
    size = weight.shape[1] // groups // repeats
    inputs, weight = (one.reshape(-1, groups, repeats, size) for one in (inputs, weight))
    bases = []
    for group in range(groups):
        gram = sum(inputs[:, group, head].T @ inputs[:, group, head] for head in range(repeats))
        energy = sum(weight[:, group, head].T @ weight[:, group, head] for head in range(repeats))
        root = torch.linalg.cholesky(gram + DAMPING * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype))
        turn = torch.linalg.eigh(root.T @ energy @ root).eigenvectors.flip(1)
        bases.append(Basis(turn.T @ torch.linalg.inv(root), root @ turn))
    return bases


@torch.no_grad()
def masked(model: Any, plan: Any, bases: list[str]) -> list[list[int]]:
    """Turn, where the engine has, and mask a whole model, block by block; returns the best units of each value pair."""
    best = []
    for index, pairs in enumerate(resolve_pruned(model)):
        pair, layout = pairs[0], pairs[0].layout
        inputs = consumer_inputs(model, pair.consumer, BATCHES)
        weight = consumer_weight(model, index, pair.spec.consumer)
        centred = inputs - inputs.mean(0) if getattr(pair.consumer, "bias", None) is not None else inputs
        if bases[index] == "principal":
            pair.turn(naive_bases(centred, weight, layout.groups, layout.repeats))
        norms = consumer_inputs(model, pair.consumer, BATCHES).norm(dim=0)
        scores = consumer_weight(model, index, pair.spec.consumer).abs().sum(0) * norms
        keep = len(plan.blocks[index][pair.spec.consumer].kept) // layout.groups
        best.append(best_units(scores, layout.groups, layout.repeats, keep))
        of_block = tuple(block if place == index else {} for place, block in enumerate(plan.blocks))
        mask_units(model, replace(plan, blocks=of_block))
    return best


@pytest.mark.sampled
@pytest.mark.parametrize("name", TINY)
def test_cut_model_equals_the_turned_and_masked_one(name: str) -> None:
    cut = double(name)
    original = copy.deepcopy(cut)
    report = FASPPruner(PLAIN).prune(cut, BATCHES)
    bases = [pair.basis for pair in report.pairs if pair.kind == "value"]
    assert "principal" in bases
    best = masked(original, cut.fasp_plan, bases)
    for pairs, wanted in zip(resolve_pruned(cut), best, strict=True):
        assert pairs[0].kept.tolist() == wanted
    with torch.no_grad():
        found, expected = (model(random_tokens(seed=9), use_cache=False).logits for model in (cut, original))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["opt", "llama", "llama-gqa"])
@pytest.mark.parametrize("restoration", ["none", "least_squares"])
def test_calibration_error_is_never_above_that_of_the_given_basis(name: str, restoration: Any) -> None:
    """Of the first block, whose inputs are the same in both; and the principal basis does win somewhere."""
    config = replace(PRINCIPAL, restoration=restoration)
    turned, given = (
        FASPPruner(one).prune(double(name), BATCHES).pairs[0] for one in (config, replace(config, value_basis="given"))
    )
    assert (turned.kind, given.basis) == ("value", "given")
    assert turned.error_after <= given.error_after
    assert turned.basis == "principal"


@pytest.mark.parametrize("family", TINY)
def test_nothing_is_turned_where_nothing_is_cut(family: str) -> None:
    model, original = tiny_model(family), tiny_model(family)
    report = FASPPruner(replace(PRINCIPAL, sparsity=0.0)).prune(model, BATCHES)
    assert report.pairs == []
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())


def test_values_that_are_not_cut_stay_in_the_given_basis() -> None:
    """attention="auto" leaves those of grouped-query attention whole."""
    models = [tiny_model("llama-gqa"), tiny_model("llama-gqa")]
    for model, basis in zip(models, ("given", "principal"), strict=True):
        FASPPruner(replace(PRINCIPAL, attention="auto", value_basis=basis)).prune(model, BATCHES)
    assert_same(*models)


@pytest.mark.parametrize("balance", ["even", "free"])
def test_cut_pairs_are_turned_again_by_a_later_pruning(balance: Any) -> None:
    model = double("llama-gqa")
    for sparsity in (0.1, 0.3):
        config = replace(PRINCIPAL, sparsity=sparsity, head_balance=balance)
        report = FASPPruner(config).prune(model, BATCHES)
        assert "principal" in {pair.basis for pair in report.pairs if pair.kind == "value"}
        assert {pair.basis for pair in report.pairs if pair.kind == "ffn"} == {"given"}
    assert report.sparsity == pytest.approx(0.3, abs=0.01)
    assert model(random_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("basis", ["given", "principal"])
def test_dims_that_the_consumer_does_not_read_go_without_loss(basis: Any) -> None:
    """A head of which half the dims are read, in a basis that no single dim shows."""
    model = double("llama")
    pair = resolve_pruned(model)[0][0]
    half = torch.arange(pair.layout.size) < pair.layout.size // 2
    for columns in pair.consumer.weight.data.split(pair.layout.size, 1):
        left, values, right = torch.linalg.svd(columns, full_matrices=False)
        columns.copy_((left * torch.where(half, values, 0)) @ right)
    found = FASPPruner(replace(PLAIN, value_basis=basis)).prune(model, BATCHES).pairs[0]
    assert (found.kind, found.width_after >= found.width_before // 2) == ("value", True)
    assert (found.error_before < 1e-6) == (basis == "principal")
