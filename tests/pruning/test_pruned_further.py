"""Pruning a pruned model: everything counts from the original."""

from __future__ import annotations

import pytest
import torch
from oracle import mask_units
from tiny import random_tokens, tiny_model
from tiny_pruning import basic, calibration, pruned

from fasp_lightning import FASPPruner


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2", "gpt_neox", "phi3", "bloom"])
def test_pruning_further_counts_from_the_original(family: str) -> None:
    model, once = tiny_model(family), tiny_model(family)
    config = {sparsity: basic(sparsity, attention="value_dims") for sparsity in (0.1, 0.3)}
    FASPPruner(config[0.1]).prune(model, calibration())
    first = model.fasp_plan
    further = FASPPruner(config[0.3]).prune(model, calibration())
    direct = FASPPruner(config[0.3]).prune(once, calibration())
    assert further.sparsity == direct.sparsity
    assert further.sparsity_total == direct.sparsity_total
    assert [p.shape for p in model.parameters()] == [p.shape for p in once.parameters()]
    for before, after in zip(first.blocks, model.fasp_plan.blocks, strict=True):
        assert all(set(after[path].kept) < set(pair.kept) for path, pair in before.items())


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2", "gpt_neox", "phi3", "bloom"])
def test_model_cut_twice_equals_masked_model(family: str) -> None:
    model = tiny_model(family)
    for sparsity in (0.1, 0.3):
        config = basic(sparsity, attention="value_dims", restoration="none")
        FASPPruner(config).prune(model, calibration())
    masked = mask_units(tiny_model(family), model.fasp_plan)
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens()).logits, masked(random_tokens()).logits, atol=1e-4, rtol=0)


def test_ffn_can_follow_the_attention() -> None:
    """Value dims that are gone count for the block, and stay gone."""
    model = pruned("llama", basic(0.1, attention="value_dims"))
    values = [block["self_attn.o_proj"] for block in model.fasp_plan.blocks]
    report = FASPPruner(basic(0.3, attention="none")).prune(model, calibration())
    assert [block["self_attn.o_proj"] for block in model.fasp_plan.blocks] == values
    assert {pair.kind for pair in report.pairs} == {"ffn"}
    assert report.sparsity == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2])
def test_sparsity_that_is_reached_already_is_refused(sparsity: float) -> None:
    model = pruned()
    with pytest.raises(ValueError, match=rf"sparsity must exceed 0\.\d+.* got {sparsity}"):
        FASPPruner(basic(sparsity, attention="value_dims")).prune(model, calibration())
