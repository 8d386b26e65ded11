"""Models with experts, and the plain way to what the engine makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tiny import random_tokens
from torch import Tensor, nn

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.pruning_plan import PruningPlan, targets


def experts_of(model: nn.Module, config: PruningConfig | None = None) -> list[ResolvedExperts]:
    """The experts of every block that has some."""
    pairs = resolve_pruned(model, whole=config.whole if config else ())
    return [pair for block in pairs for pair in block if isinstance(pair, ResolvedExperts)]


def many_tokens(batches: int = 4) -> list[Any]:
    """So many tokens that the experts of tiny models mostly see more than they have hidden units."""
    return [random_tokens(4, 60, seed=seed) for seed in range(batches)]


def closed(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Close the units that a plan takes from pairs: their consumers' columns are zero."""
    for pair, kept in targets(model, resolve_pruned(model), plan):
        pair.shut(kept)
    return model


@torch.no_grad()
def called_with(model: nn.Module, pair: ResolvedExperts, batches: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the experts of a block are called with in whole forwards: (tokens, hidden), and twice (tokens, k)."""
    found: list[tuple[Tensor, ...]] = []
    handle = pair.module.register_forward_pre_hook(lambda _, args: found.append(args))
    for batch in batches:
        model(batch, use_cache=False)
    handle.remove()
    hidden, chosen, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return hidden, chosen, weights
