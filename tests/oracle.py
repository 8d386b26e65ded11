"""The naive way to the engine's outcome: mask the whole model, hook every consumer, stack least squares.

Nothing is cut, replayed or streamed here, so that an error in the engine's shortcuts shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tiny import with_positions
from torch import Tensor, nn

from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.structure.registry import spec_for


def consumer_columns(layout: PairLayout, units: Iterable[int]) -> list[int]:
    """Consumer columns that ``units`` feed, by counting: heads of a KV group stand side by side."""
    if layout.kind == "ffn":
        return sorted(units)
    if layout.kind == "groups":
        span = layout.repeats * layout.head_size
        return sorted(unit * span + column for unit in units for column in range(span))
    size = layout.width // layout.groups
    return sorted(
        (unit // size * layout.repeats + head) * size + unit % size for unit in units for head in range(layout.repeats)
    )


def consumer_weight(model: nn.Module, block: int, path: str) -> Tensor:
    """(out, in) view of an uncut consumer's weight; writing to it writes to the model."""
    spec = spec_for(model)
    weight = model.get_submodule(f"{spec.layers}.{block}.{path}").weight.data
    return weight.T if spec.transposed else weight


def mask_units(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Zero the consumer columns of the units that a plan removes; everything else stays."""
    for index, block in enumerate(plan.blocks):
        for path, pair in block.items():
            gone = sorted(set(range(pair.layout.width)) - set(pair.kept))
            consumer_weight(model, index, path)[:, consumer_columns(pair.layout, gone)] = 0
    return model


@torch.no_grad()
def consumer_inputs(model: nn.Module, consumer: nn.Module, batches: Iterable[Any]) -> Tensor:
    """(tokens, n) inputs of a consumer at the real tokens, from whole forwards; float64."""
    found: list[Tensor] = []
    handle = consumer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    rows = []
    for batch in batches:
        mask = None if isinstance(batch, Tensor) else batch["attention_mask"]
        model(**with_positions(model, batch), use_cache=False)
        inputs = found.pop()
        inputs = inputs.reshape(-1, inputs.shape[-1])
        rows.append(inputs if mask is None else inputs[mask.bool().reshape(-1)])
    handle.remove()
    return torch.cat(rows).double()


def best_units(scores: Tensor, groups: int, repeats: int, keep: int) -> list[int]:
    """Units with the best scores, the same number in each group; ``scores`` is one a column."""
    per_unit = scores.reshape(groups, repeats, -1).sum(1)
    best = per_unit.topk(keep, dim=1).indices + torch.arange(groups).unsqueeze(1) * per_unit.shape[1]
    return sorted(best.flatten().tolist())


def least_squares(inputs: Tensor, weight: Tensor, columns: list[int], damping: float, ridge: str) -> Tensor:
    """argmin ‖X Wᵀ − X_M Ŵᵀ‖² + λ‖Ŵ − A‖² from the stacked system (X_M; √λ I) Ŵᵀ = (X Wᵀ; √λ Aᵀ)."""
    strength = (damping * inputs.square().sum(0).mean()).sqrt()
    anchor = weight[:, columns] if ridge == "original" else torch.zeros_like(weight[:, columns])
    system = torch.cat([inputs[:, columns], strength * torch.eye(len(columns), dtype=inputs.dtype)])
    target = torch.cat([inputs @ weight.T, strength * anchor.T])
    return torch.linalg.lstsq(system, target).solution.T


@torch.no_grad()
def reference(model: nn.Module, batches: list[Any], config: PruningConfig) -> list[dict[str, list[int]]]:
    """Mask and restore ``model`` in place, pair after pair; returns the units kept, one mapping a block."""
    spec, kept = spec_for(model), []
    for index, widths in enumerate(decide_budget(model, config).pairs):
        kept.append({})
        for pair, width in zip(spec.pairs, widths, strict=True):
            if width.after == width.original:
                continue
            consumer = model.get_submodule(f"{spec.layers}.{index}.{pair.consumer}")
            weight = consumer_weight(model, index, pair.consumer)
            inputs = consumer_inputs(model, consumer, batches)
            groups, repeats = 1, width.columns // width.original
            if width.kind == "value":
                groups = model.config.num_attention_heads // repeats
            scores = weight.double().abs().sum(0) * inputs.norm(dim=0)
            layout = PairLayout(width.kind, width.original, groups, repeats, None, ())
            if width.kind == "groups":  # all columns of a group stand side by side
                scores, repeats = scores.reshape(width.original, repeats).sum(1), 1
                heads = model.config.num_attention_heads // width.original
                rows = width.original * (heads + 2) * width.head_size
                layout = PairLayout("groups", width.original, 1, heads, None, (rows,))
            units = best_units(scores, groups, repeats, width.after // groups)
            _restore(consumer, weight, inputs, consumer_columns(layout, units), config)
            kept[index][pair.consumer] = units
    return kept


def _restore(consumer: nn.Module, weight: Tensor, inputs: Tensor, columns: list[int], config: PruningConfig) -> None:
    original, bias = weight.double().clone(), getattr(consumer, "bias", None)
    refit = bias is not None and config.refit_bias
    mean = inputs.mean(0) if refit else torch.zeros_like(inputs[0])
    plain = original[:, columns]
    restored = least_squares(inputs - mean, original, columns, config.damping, config.ridge)
    shift = original @ mean - restored @ mean[columns]
    target = inputs @ original.T
    before = (inputs[:, columns] @ plain.T - target).norm()
    after = (inputs[:, columns] @ restored.T + shift - target).norm()
    if config.restoration == "none" or after > before:
        restored, shift = plain, torch.zeros_like(shift)
    weight.zero_()
    weight[:, columns] = restored.to(weight.dtype)
    if refit:
        bias.data += shift
