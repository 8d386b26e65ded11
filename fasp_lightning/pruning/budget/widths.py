"""How many units each pair keeps: decided, and rounded, from shapes alone before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import SHARED, Budget, PairWidth
from fasp_lightning.pruning.budget.shares import level, missing, removed, share_to_remove, size_of
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters, parameter_count
from fasp_lightning.structure.stock_fields import accepts, stock_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = list[list[ResolvedPair]]
"""The pairs of each block."""

KERNEL_MULTIPLES, FINEST = (256, 128, 64, 32), 32
"""Numbers of columns that kernels and quantised formats work on at a time; an FFN width has at least ``FINEST`` steps
of the one that it is rounded to."""

PRUNED = {"value_dims": {"ffn", "value"}, "kv_groups": {"ffn", "groups"}, "none": {"ffn"}}
"""Kinds of pairs that are cut, by what is done with the attention."""


def decide_budget(model: PreTrainedModel, config: PruningConfig, pairs: Pairs | None = None) -> Budget:
    """Decide the widths; needs shapes only, so the model may be on the ``meta`` device.

    P_all counts the blocks' linear parameters, c_p the parameters of one unit of pair p. R = sparsity · P_all and
    r = R / Σ n_p c_p over the pairs to be pruned. Value pairs lose round(r · head size) dims in each KV head, or that
    share of all dims with ``head_balance="free"``; of KV groups as many go as are nearest to r. The FFN pair takes up
    what is left of the block's share, to the nearest column and then to the nearest multiple; value dims take up
    what that leaves.

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
    ffns = (width.original for block in budget.pairs for width in block if width.kind == "ffn")
    multiple = max((ffn_multiple(width, config) for width in ffns), default=1)
    if not gone and not budget.changes and config.sparsity and multiple > 1:
        raise FaspError(
            f"multiple_of must be small enough for a cut of {config.sparsity}, got {multiple}: "
            "rounded to it, no width changes; lower it, or raise the sparsity"
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
    """Units of a pair that go at a time: one value dim of every head that is kept even, a multiple of FFN units.

    Args:
        pair: The pair.
        config: ``head_balance`` and ``multiple_of`` are read.
    """
    if pair.spec.kind == "ffn":
        return ffn_multiple(pair.layout.width, config)
    return pair.layout.groups if config.head_balance == "even" else 1


def ffn_multiple(width: int, config: PruningConfig) -> int:
    """What an FFN width is rounded to a multiple of.

    Kernels and quantised formats work on blocks of 32 to 256 columns: llama.cpp stores a row whose length does not
    divide by 32 (for K-quants: by 256) unquantised, Marlin wants 128. The largest of these that costs at most 1/32 of
    the width in rounding is taken.

    Args:
        width: The original FFN width.
        config: ``multiple_of`` is read.
    """
    if config.multiple_of != "auto":
        return config.multiple_of
    if width < KERNEL_MULTIPLES[-1] * FINEST:
        return KERNEL_MULTIPLES[-1] if width % KERNEL_MULTIPLES[-1] == 0 else 1
    return next(multiple for multiple in KERNEL_MULTIPLES if multiple * FINEST <= width)


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
    multiple = ffn_multiple(pair.layout.width, config)
    if multiple > pair.layout.width:
        raise FaspError(f"multiple_of must be at most the FFN width {pair.layout.width}, got {multiple}")
    return multiple


def _block_units(block: list[ResolvedPair], pruned: set[str], share: float, config: PruningConfig) -> list[int]:
    """What the pairs of a block keep where value dims and FFN lose the same share, or the FFN alone loses it.

    Value dims are decided twice: the FFN takes up what their rounding leaves, and they what that of the FFN leaves.
    """
    sizes = [size_of(pair) if pair.spec.kind in pruned else 0 for pair in block]
    wanted = share * sum(sizes)
    share = level(wanted, sizes, list(map(removed, block)))
    gone = [max(share * size, removed(pair)) for size, pair in zip(sizes, block, strict=True)]
    units = [pair.kept.numel() for pair in block]
    order = [place for place, pair in enumerate(block) if pair.spec.kind in pruned]
    for place in [*order, *order[:-1]]:
        pair = block[place]
        left = _width_without(pair, wanted - sum(gone[:place] + gone[place + 1 :]), config)
        units[place] = min(left, pair.kept.numel())
        gone[place] = (pair.layout.width - units[place]) * pair.unit_cost
    return units


def _width_without(pair: ResolvedPair, wanted: float, config: PruningConfig) -> int:
    """Width at which about ``wanted`` parameters are gone; something is left of every FFN and every KV head."""
    if pair.spec.kind == "ffn":
        return _ffn_width(pair, wanted, config)
    step = step_units(pair, config)
    dims = step * round(max(wanted, 0.0) / (step * pair.unit_cost))
    return pair.layout.width - min(dims, pair.layout.width - pair.layout.groups)


def _ffn_width(pair: ResolvedPair, wanted: float, config: PruningConfig) -> int:
    """Width at which about ``wanted`` parameters are gone, to the nearest column, then to the nearest multiple."""
    width, multiple = pair.layout.width, ffn_multiple(pair.layout.width, config)
    left = width - round(max(wanted, 0.0) / pair.unit_cost)
    if left < width:
        left = max(multiple, round(left / multiple) * multiple)
    return max(1, min(left, width))


def _groups_left(pairs: Pairs, counts: list[int], share: float, total: int, config: PruningConfig) -> int:
    """The number of KV groups nearest to their share with which the FFNs can take up the rest."""
    layout = next(pair.layout for block in pairs for pair in block if pair.spec.kind == "groups")
    ffns = [pair for block in pairs for pair in block if pair.spec.kind == "ffn"]
    lowest = sum(removed(pair) - pair.unit_cost / 2 for pair in ffns)
    highest = sum((pair.layout.width - step_units(pair, config)) * pair.unit_cost for pair in ffns)
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
        return count if pair.spec.kind == "groups" else _ffn_width(pair, share * size_of(pair), config)

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
    if attention == "value_dims" and any(pair.spec.kind == "groups" for block in pairs for pair in block):
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
