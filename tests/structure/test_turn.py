"""Turning the value dims of every KV head changes nothing that a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model

from fasp_lightning.ops.basis import Basis
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned


def bases_of(pair: ResolvedPair) -> list[Basis]:
    """A different one for each KV head."""
    generator, bases = torch.Generator().manual_seed(0), []
    for dims in pair.layout.dims(pair.kept):
        noise = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
        forward = torch.eye(dims, dtype=torch.float64) + 0.3 * noise
        bases.append(Basis(forward, torch.linalg.inv(forward)))
    return bases


@torch.no_grad()
def assert_turning_changes_nothing(model: Any, pairs: list[ResolvedPair]) -> None:
    before = model(random_tokens(), use_cache=False).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for pair in pairs:
        pair.turn(bases_of(pair))
    assert (model(random_tokens(), use_cache=False).logits - before).abs().max() < 1e-10
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert len(changed) >= 2 * model.config.num_hidden_layers


def value_pairs(model: Any) -> list[ResolvedPair]:
    return [pair for pair, *_ in resolve_pruned(model)]


@pytest.mark.parametrize("name", TINY)
def test_turned_model_gives_the_same_logits(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    assert_turning_changes_nothing(model, value_pairs(model))


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2", "bloom"])
def test_so_does_one_whose_heads_are_cut_unevenly(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    pairs = value_pairs(model)
    for pair in pairs:  # the first head loses all
        pair.cut(pair.kept[(pair.kept >= pair.layout.size) & (pair.kept % 3 > 0)])
    assert_turning_changes_nothing(model, pairs)
