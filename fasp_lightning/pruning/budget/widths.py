"""How many units each pair keeps: decided, and rounded, from shapes alone before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import SHARED, Budget, PairWidth
from fasp_lightning.pruning.budget.shares import level, missing, removed, share_to_remove, size_of
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.linears import linear_parameters, parameter_count
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.stock_fields import accepts, stock_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = list[list[ResolvedPair]]
"""The pairs of each block."""

PRUNED = {"value_dims": {"ffn", "value"}, "kv_groups": {"ffn", "groups"}, "none": {"ffn"}}
"""Kinds of pairs that are cut, by what is done with the attention."""


def decide_budget(model: PreTrainedModel, config: PruningConfig, pairs: Pairs | None = None) -> Budget:
    """Decide the widths; needs shapes only, so the model may be on the ``meta`` device.

    P_all counts the blocks' linear parameters, c_p the parameters of one unit of pair p. R = sparsity · P_all and
    r = R / Σ n_p c_p over the pairs to be pruned. Value pairs lose round(r · head size) dims in each KV head, or that
    share of all dims with ``head_balance="free"``; of KV groups as many go as are nearest to r. The FFN pair takes up
    what is left of the block's share, to the nearest column and then to the nearest multiple.

    Args:
        model: A causal LM, pruned before or not; sparsity counts from the original.
        config: ``sparsity``, ``attention``, ``head_balance``, ``allocation`` and ``multiple_of`` are read.
        pairs: The model's pairs, if they are resolved already; or as they will be after another pruning, fewer units
            of them.

    Raises:
        FaspError: If the sparsity cannot be reached with what is to be kept (the message gives the highest that
            can), lies below what is pruned already, ``multiple_of`` exceeds the FFN width, or ``attention`` or
            ``head_balance`` do not fit the family or what was cut before.
    """
    budget = budget_towards(model, config, pairs)
    gone = budget.original_parameters > budget.parameters_before
    if not gone and not budget.changes and config.sparsity and config.multiple_of > 1:
        raise FaspError(
            f"multiple_of must be small enough for a cut of {config.sparsity}, got {config.multiple_of}: "
            "rounded to it, no width changes"
        )
    if gone and not budget.changes:
        raise FaspError(f"sparsity must exceed {budget.sparsity:.4f}, which is pruned already, got {config.sparsity}")
    return budget


def is_reached(model: PreTrainedModel, config: PruningConfig) -> bool:
    """Whether a model is pruned that far already, so that :func:`decide_budget` would refuse to prune it further."""
    budget = budget_towards(model, config)
    return budget.original_parameters > budget.parameters_before and not budget.changes


def present_budget(model: PreTrainedModel) -> Budget:
    """The widths of a model as it is: nothing is to be cut."""
    return budget_towards(model, PruningConfig(sparsity=0.0, attention="none"))


def budget_towards(model: PreTrainedModel, config: PruningConfig, pairs: Pairs | None = None) -> Budget:
    """As :func:`decide_budget`, but a budget that changes nothing is no error: it may be one of several rounds.

    Args:
        model: As there.
        config: As there.
        pairs: As there.

    Raises:
        FaspError: As there, but for that.
    """
    pairs = pairs or resolve_pruned(model, kv_groups=config.attention == "kv_groups")
    attention = _decide_attention(pairs, config.attention)
    if attention == "value_dims" and config.head_balance == "even":
        _require_even(pairs)
    pruned = PRUNED[attention]
    counts = _group_counts(model, pairs) if attention == "kv_groups" else []
    now, gone = (sum(count(pair) for block in pairs for pair in block) for count in (missing, removed))
    total = linear_parameters(model, spec_for(model)) + now
    left = _units_left(pairs, pruned, config, total, counts)
    widths = tuple(tuple(map(_width, block, units)) for block, units in zip(pairs, left, strict=True))
    parameters = parameter_count(model) + now - gone
    newly = sum(width.removed for block in widths for width in block)
    if config.allocation == "adaptive":  # the sum alone is known: what the uniform widths are rounded to is not
        decided = [pair for block in pairs for pair in block if pair.spec.kind in pruned - {SHARED}]
        newly = round(config.sparsity * total) - gone
        if newly <= max(step_units(pair, config) * pair.unit_cost for pair in decided) / 2:
            newly, widths = 0, tuple(tuple(replace(width, after=width.before) for width in block) for block in widths)
    return Budget(widths, total, parameters + gone, parameters, parameters - newly, attention, config.allocation)


def step_units(pair: ResolvedPair, config: PruningConfig) -> int:
    """Units of a pair that go at a time: one value dim of every head that is kept even, ``multiple_of`` FFN units.

    Args:
        pair: The pair.
        config: ``head_balance`` and ``multiple_of`` are read.
    """
    if pair.spec.kind == "ffn":
        return config.multiple_of
    return pair.layout.groups if config.head_balance == "even" else 1


def _units_left(
    pairs: Pairs, pruned: set[str], config: PruningConfig, total: int, counts: list[int]
) -> list[list[int]]:
    """Units that each pair of each block keeps.

    Args:
        pairs: The pairs of each block, an FFN last: it takes up what is left of the block's share.
        pruned: Kinds of the pairs that are cut.
        config: ``sparsity``, ``head_balance`` and ``multiple_of`` are read.
        total: P_all, the linear parameters in the blocks of the original model.
        counts: Numbers of KV groups that can be left, ascending, the present one last; none where value dims are cut.

    Raises:
        FaspError: If the sparsity cannot be reached with what is to be kept, or ``multiple_of`` exceeds the FFN width.
    """
    least = [[_least(pair, config, counts) if pair.spec.kind in pruned else None for pair in block] for block in pairs]
    kept = "queries and keys" if "value" in pruned else f"{counts[0]} KV groups" if counts else "the attention"
    share = share_to_remove(pairs, least, config.sparsity, total, kept)
    if counts:
        return _with_groups(pairs, _groups_left(pairs, counts, share, total, config), total, config)
    return [_block_units(block, pruned, share, config) for block in pairs]


def _least(pair: ResolvedPair, config: PruningConfig, counts: list[int]) -> int:
    """Fewest units that are left: one value dim in each KV head, one step of the FFN width."""
    if pair.spec.kind == "value":
        return pair.layout.groups
    if pair.spec.kind == "groups":
        return counts[0]
    if config.multiple_of > pair.layout.width:
        raise FaspError(f"multiple_of must be at most the FFN width {pair.layout.width}, got {config.multiple_of}")
    return config.multiple_of


def _block_units(block: list[ResolvedPair], pruned: set[str], share: float, config: PruningConfig) -> list[int]:
    """What the pairs of a block keep where value dims and FFN lose the same share, or the FFN alone loses it."""
    sizes = [size_of(pair) if pair.spec.kind in pruned else 0 for pair in block]
    wanted = share * sum(sizes)
    share = level(wanted, sizes, list(map(removed, block)))
    units = []
    for pair in block:
        left = pair.layout.width
        if pair.spec.kind == "ffn":
            left = _ffn_width(pair, wanted, config.multiple_of)
        elif pair.spec.kind in pruned:
            left -= _value_dims(pair.layout, share, config.head_balance)
        left = min(left, pair.kept.numel())
        wanted -= (pair.layout.width - left) * pair.unit_cost
        units.append(left)
    return units


def _value_dims(layout: PairLayout, share: float, head_balance: str) -> int:
    """How many value dims go; at least one a KV head is left."""
    heads = layout.groups if head_balance == "even" else 1
    return min(heads * round(share * layout.width / heads), layout.width - layout.groups)


def _ffn_width(pair: ResolvedPair, wanted: float, multiple_of: int) -> int:
    """Width at which about ``wanted`` parameters are gone, to the nearest column, then to the nearest multiple."""
    width = pair.layout.width
    left = width - round(max(wanted, 0.0) / pair.unit_cost)
    if left < width:
        left = max(multiple_of, round(left / multiple_of) * multiple_of)
    return max(1, min(left, width))


def _groups_left(pairs: Pairs, counts: list[int], share: float, total: int, config: PruningConfig) -> int:
    """The number of KV groups nearest to their share with which the FFNs can take up the rest."""
    layout = next(pair.layout for pair in pairs[0] if pair.spec.kind == "groups")
    ffns = [pair for block in pairs for pair in block if pair.spec.kind == "ffn"]
    lowest = sum(removed(pair) - pair.unit_cost / 2 for pair in ffns)
    highest = sum((pair.layout.width - config.multiple_of) * pair.unit_cost for pair in ffns)
    found = []
    for count in counts:
        rest = _beside_groups(pairs, count, total, config)
        if not ffns or (rest <= highest and (rest >= lowest or count == counts[-1])):
            found.append(count)
    if not found:
        raise FaspError(
            f"sparsity must be one that whole KV groups and the FFN make up together, got {config.sparsity}: stock "
            f"code can hold {', '.join(map(str, counts))} of {layout.width} groups; use 'value_dims' or 'none'"
        )
    return min(found, key=lambda count: (abs(count - (1 - share) * layout.width), -count))


def _beside_groups(pairs: Pairs, count: int, total: int, config: PruningConfig) -> float:
    """Parameters that are to go from elsewhere when so many KV groups are left."""
    groups = [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    left = [min(count, pair.kept.numel()) for pair in groups]
    gone = sum((pair.layout.width - units) * pair.unit_cost for pair, units in zip(groups, left, strict=True))
    return config.sparsity * total - gone


def _with_groups(pairs: Pairs, count: int, total: int, config: PruningConfig) -> list[list[int]]:
    """What each pair keeps when so many KV groups are left, and all FFNs lose the same share of the rest."""
    ffns = [pair for block in pairs for pair in block if pair.spec.kind == "ffn"]
    rest = _beside_groups(pairs, count, total, config)
    share = level(rest, [size_of(pair) for pair in ffns], [removed(pair) for pair in ffns])

    def left(pair: ResolvedPair) -> int:
        return count if pair.spec.kind == "groups" else _ffn_width(pair, share * size_of(pair), config.multiple_of)

    return [[min(left(pair), pair.kept.numel()) for pair in block] for block in pairs]


def _width(pair: ResolvedPair, left: int) -> PairWidth:
    return PairWidth(
        layer=pair.layer,
        kind=pair.spec.kind,
        original=pair.layout.width,
        before=pair.kept.numel(),
        after=left,
        columns=pair.columns,
        cost=pair.unit_cost,
        head_size=pair.layout.head_size,
    )


def _decide_attention(pairs: Pairs, attention: str) -> str:
    value = [pair for block in pairs for pair in block if pair.spec.kind == "value"]
    if attention == "value_dims" and any(pair.spec.kind == "groups" for pair in pairs[0]):
        raise FaspError(
            "attention='value_dims' cannot follow 'kv_groups' on the same model, whose plan counts in KV groups; "
            "go on with 'kv_groups' or 'none', or prune the original model"
        )
    if attention == "value_dims" and not value:
        raise FaspError(
            "attention='value_dims' needs a value pair in the architecture's row, which has none; use 'none'"
        )
    if attention == "auto":
        return "value_dims" if value and all(pair.layout.repeats == 1 for pair in value) else "none"
    return attention


def _require_even(pairs: Pairs) -> None:
    for pair in (pair for block in pairs for pair in block if pair.spec.kind == "value"):
        dims = torch.bincount(pair.kept // pair.layout.size, minlength=pair.layout.groups)
        if dims.min() < dims.max():
            raise FaspError(
                "head_balance must be 'free' where KV heads keep different numbers of value dims, got 'even': those of "
                f"{pair.name} keep {', '.join(map(str, dims.tolist()))}"
            )


def _group_counts(model: PreTrainedModel, pairs: Pairs) -> list[int]:
    """Numbers of KV groups that the model's config can hold, ascending, the present one last."""
    spec, attention = spec_for(model), [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    layout, left = attention[0].layout, max(pair.kept.numel() for pair in attention)
    fewer = [count for count in range(1, left) if accepts(model.config, stock_fields(spec, layout, count))]
    return [*fewer, left]
