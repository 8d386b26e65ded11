"""Tiny models pruned on tiny texts: what the engine's tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny import random_tokens, tiny_model
from torch import nn

from fasp_lightning import FASPPruner, PruningConfig, PruningPlan, apply_plan
from fasp_lightning.pruning.blocks.standins import StandIn
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.structure.compact import CompactPaths, WidthHook
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.pruning_plan import PairPlan


def basic(sparsity: float = 0.2, **options: Any) -> PruningConfig:
    """Settings without gradients, own text and multiples, but for what the options say; much faster on tiny models."""
    return PruningConfig(sparsity, **{"score": "wanda", "own_text": None, "multiple_of": 1, **options})


BOTH = basic(attention="value_dims")
FFN = basic(attention="none")

OWN = OwnTextConfig(tokens=5 * 20, seq_len=20, share=0.4)
INGREDIENTS = {
    "fisher": replace(BOTH, score="fisher"),
    "adaptive": replace(BOTH, allocation="adaptive", head_balance="free"),
    "influence": replace(BOTH, allocation="block_influence"),
    "auto": replace(BOTH, damping="auto"),
    "principal": replace(BOTH, value_basis="principal", damping="auto"),
    "own-text": replace(BOTH, own_text=OWN),
    "rounds": replace(BOTH, score="fisher", own_text=OWN, rounds=2),
    "everything": replace(BOTH, score="fisher", allocation="adaptive", damping="auto", own_text=OWN),
}
"""Settings that look at more than the inputs of one consumer."""


def calibration(batches: int = 3) -> list[Any]:
    """More tokens than the widest common pair has columns; one batch is left-padded."""
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    padded = {"input_ids": random_tokens(2, 40, seed=99), "attention_mask": mask}
    return [padded, *(random_tokens(2, 40, seed=seed) for seed in range(batches - 1))]


def pruned(name: str = "llama", config: PruningConfig = BOTH, batches: Any = None) -> nn.Module:
    """A new tiny model after one pruning."""
    model = tiny_model(name)
    FASPPruner(config).prune(model, batches or calibration())
    return model


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    """Plan and state dict of both models are equal."""
    assert first.fasp_plan == second.fasp_plan
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], atol=tolerance, rtol=tolerance)


def assert_unchanged(model: nn.Module, name: str = "llama") -> None:
    """The model is as :func:`tiny_model` makes it."""
    original = tiny_model(name).state_dict()
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


def leftovers(model: nn.Module) -> list[str]:
    """Stand-ins and hooks that a model still has, but for the hooks of its compact layers."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, StandIn)
        or not all(
            isinstance(hook, (WidthHook, CompactPaths))
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    ]


def plan_keeping(model: nn.Module, kind: str, *counts: int) -> PruningPlan:
    """A plan that keeps so many units of one kind in each block, the last ones; blocks after that as the last."""
    blocks = []
    for index, block in enumerate(resolve_pruned(model)):
        pair = next(pair for pair in block if pair.spec.kind == kind)
        width, count = pair.layout.width, counts[min(index, len(counts) - 1)]
        kept = PairPlan(pair.layout, tuple(range(width - count, width)))
        blocks.append({pair.spec.consumer: kept} if count < width else {})
    return PruningPlan(model.config.model_type, tuple(blocks))


def uneven(name: str = "llama", *counts: int) -> nn.Module:
    """A tiny model with 30 FFN units in its first block and 40 in the others, or as given."""
    model = tiny_model(name)
    return apply_plan(model, plan_keeping(model, "ffn", *(counts or (30, 40))))
