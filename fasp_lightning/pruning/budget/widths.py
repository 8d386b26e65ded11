"""How many units each pair keeps: decided, and rounded, from shapes alone before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import SHARED, Budget, PairWidth
from fasp_lightning.pruning.budget.groups import Pairs, group_counts, groups_left, with_groups
from fasp_lightning.pruning.budget.rounding import FFNS, fewest_units, ffn_widths, multiple_of, step_units, together
from fasp_lightning.pruning.budget.shares import level, missing, removed, share_to_remove, size_of
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters, parameter_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALWAYS = FFNS | {"whole_experts"}
PRUNED = {"value_dims": {"value"} | _ALWAYS, "kv_groups": {"groups"} | _ALWAYS, "none": _ALWAYS}
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
    pairs = pairs or resolve_pruned(model, whole=config.whole)
    budget = budget_towards(model, config, pairs)
    gone = budget.original_parameters > budget.parameters_before
    ffns = (pair for block in pairs for pair in block if pair.spec.kind in FFNS)
    multiple = max((multiple_of(pair, config) for pair in ffns), default=1)
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
    pairs = pairs or resolve_pruned(model, whole=config.whole)
    attention = _decide_attention(pairs, config.attention)
    if attention == "value_dims" and config.head_balance == "even":
        _require_even(pairs)
    _require_together(pairs, config, attention)
    pruned = PRUNED[attention]
    counts = group_counts(model, pairs) if attention == "kv_groups" else []
    now, gone = (sum(count(pair) for block in pairs for pair in block) for count in (missing, removed))
    total = linear_parameters(model, spec_for(model)) + now
    left = _units_left(pairs, pruned, config, total, counts)
    widths = tuple(tuple(map(_width, block, units)) for block, units in zip(pairs, left, strict=True))
    parameters = parameter_count(model) + now - gone
    newly = sum(width.removed for block in widths for width in block)
    if config.allocation != "uniform":  # the sum alone is known: what the uniform widths are rounded to is not
        decided = [pair for block in pairs for pair in block if pair.spec.kind in pruned - {SHARED}]
        newly = round(config.sparsity * total) - gone
        if newly <= max(step_units(pair, config) * pair.unit_cost for pair in decided) / 2:
            newly, widths = 0, tuple(tuple(replace(width, after=width.before) for width in block) for block in widths)
    return Budget(widths, total, parameters + gone, parameters, parameters - newly, attention, config.allocation)


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
    least = [_least(block, pruned, config, counts) for block in pairs]
    kept = "queries and keys" if "value" in pruned else f"{counts[0]} KV groups" if counts else "the attention"
    share = share_to_remove(pairs, least, config.sparsity, total, kept)
    if counts:
        return with_groups(pairs, groups_left(pairs, counts, share, total, config), total, config)
    return [_block_units(block, fewest, share, config) for block, fewest in zip(pairs, least, strict=True)]


def _least(block: list[ResolvedPair], pruned: set[str], config: PruningConfig, counts: list[int]) -> list[int | None]:
    """Fewest units that are left of each pair; ``None`` for those that are not pruned.

    That is one value dim in each KV head, one step of the FFN width, as many experts as the router picks. An FFN whose
    width stands in the config field of that of whole experts stays.
    """
    least: list[int | None] = [None] * len(block)
    whole = {pair.spec.width_field for pair in block if pair.spec.kind == "whole_experts"}
    for places in together(block):
        pairs = [block[place] for place in places]
        kind = pairs[0].spec.kind
        if kind not in pruned or (kind == "ffn" and pairs[0].spec.width_field in whole):
            continue
        found = fewest_units(pairs, config) if kind in FFNS else [_fewest(pairs[0], counts)]
        for place, fewest in zip(places, found, strict=True):
            least[place] = fewest
    return least


def _fewest(pair: ResolvedPair, counts: list[int]) -> int:
    """Fewest value dims, KV groups or whole experts."""
    if isinstance(pair, ResolvedExperts):
        return pair.fewest
    return counts[0] if pair.spec.kind == "groups" else pair.layout.groups


def _block_units(block: list[ResolvedPair], least: list[int | None], share: float, config: PruningConfig) -> list[int]:
    """What the pairs of a block keep where value dims and FFN lose the same share, or the FFN alone loses it.

    Value dims are decided twice: the FFN takes up what their rounding leaves, and they what that of the FFN leaves.
    """
    sizes = [0 if fewest is None else size_of(pair) for pair, fewest in zip(block, least, strict=True)]
    wanted = share * sum(sizes)
    share = level(wanted, sizes, list(map(removed, block)))
    gone = [max(share * size, removed(pair)) for size, pair in zip(sizes, block, strict=True)]
    units = [pair.kept.numel() for pair in block]
    order = [places for places in together(block) if least[places[0]] is not None]
    for places in [*order, *order[:-1]]:
        pairs, others = [block[place] for place in places], set(range(len(block))) - set(places)
        left = _widths_without(pairs, least[places[0]] or 1, wanted - sum(gone[place] for place in others), config)
        for place, pair, count in zip(places, pairs, left, strict=True):
            units[place] = min(count, pair.kept.numel())
            gone[place] = (pair.layout.width - units[place]) * pair.unit_cost
    return units


def _widths_without(pairs: list[ResolvedPair], least: int, wanted: float, config: PruningConfig) -> list[int]:
    """Widths at which about ``wanted`` parameters are gone; something is left of every FFN and every KV head."""
    pair = pairs[0]
    if pair.spec.kind in FFNS:
        return ffn_widths(pairs, wanted, config)
    step = step_units(pair, config)
    units = step * round(max(wanted, 0.0) / (step * pair.unit_cost))
    return [pair.layout.width - min(units, pair.layout.width - least)]


def _width(pair: ResolvedPair, left: int) -> PairWidth:
    return PairWidth(
        layer=pair.layer,
        consumer=pair.spec.consumer,
        kind=pair.spec.kind,
        original=pair.layout.width,
        before=pair.kept.numel(),
        after=left,
        columns=pair.columns // (pair.count if isinstance(pair, ResolvedExperts) else 1),
        cost=pair.unit_cost,
        head_size=pair.layout.head_size,
        parts=pair.layout.groups if pair.spec.kind == "experts" else 1,
        idle=pair.idle if isinstance(pair, ResolvedExperts) else 0,
        sent=pair.top_k if isinstance(pair, ResolvedExperts) else 0,
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


def _require_together(pairs: Pairs, config: PruningConfig, attention: str) -> None:
    """Refuse settings that models with experts do not bear."""
    kinds = {pair.spec.kind for block in pairs for pair in block}
    if "experts" not in kinds and "whole_experts" not in kinds:
        return
    if config.needs_sensitivity:
        raise FaspError(
            "score must be 'wanda', 'magnitude' or 'auto', and allocation 'uniform', with experts, got "
            f"{config.score!r} and {config.allocation!r}: loss sensitivity is measured at the inputs of linear modules"
        )
    if "whole_experts" in kinds and attention == "kv_groups":
        raise FaspError("attention must be 'none' or 'value_dims' with experts='whole', got 'kv_groups'")
    if "whole_experts" in kinds and config.experts == "columns":
        raise FaspError(
            "experts='columns' cannot follow 'whole' on the same model, whose plan counts in whole experts; go on with "
            "'whole', or prune the original model"
        )


def _require_even(pairs: Pairs) -> None:
    for pair in (pair for block in pairs for pair in block if pair.spec.kind == "value"):
        dims = torch.bincount(pair.kept // pair.layout.size, minlength=pair.layout.groups)
        if dims.min() < dims.max():
            raise FaspError(
                "head_balance must be 'free' where KV heads keep different numbers of value dims, got 'even': those of "
                f"{pair.name} keep {', '.join(map(str, dims.tolist()))}"
            )
