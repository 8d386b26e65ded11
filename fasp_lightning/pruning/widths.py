"""How many units each pair keeps: exact arithmetic before any computing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.plan import resolve_pruned
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.linears import linear_parameters, parameter_count
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.stock import accepts, stock_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PairWidth:
    """Width of one pair, in units (hidden units of the FFN, value dims over all KV heads, or KV groups).

    Attributes:
        layer: Path of the consumer, from the causal LM.
        kind: ``"ffn"``, ``"value"`` or ``"groups"``.
        original: Units of the original model.
        before: Units before this pruning.
        after: Units after it.
        columns: Columns of the consumer before this pruning: the size of its gram matrix.
        cost: Parameters that go with one unit.
        head_size: Size of the attention heads, 0 for an FFN.
    """

    layer: str
    kind: str
    original: int
    before: int
    after: int
    columns: int
    cost: int
    head_size: int

    def cached(self, units: int) -> int:
        """Entries of one token in the KV cache when so many units are left."""
        if self.kind == "value":  # cut values are scattered to their full width, which is that of the keys
            return 2 * self.original
        return 2 * units * self.head_size


@dataclass(frozen=True)
class WidthPlan:
    """Widths of a whole model and what they amount to.

    Attributes:
        pairs: One tuple a block.
        linear_parameters: P_all, the linear parameters in the blocks of the original model.
        original_parameters: All parameters of the original model; tied ones count once.
        parameters_before: All parameters before this pruning.
        parameters_after: All parameters after it.
        attention: ``"value_dims"``, ``"kv_groups"`` or ``"none"``, as decided.
        allocation: As asked. With ``"adaptive"`` the widths of single blocks are not known before calibration:
            ``pairs`` are the uniform ones, the sum is exact.
    """

    pairs: tuple[tuple[PairWidth, ...], ...]
    linear_parameters: int
    original_parameters: int
    parameters_before: int
    parameters_after: int
    attention: str
    allocation: str = "uniform"

    @property
    def sparsity(self) -> float:
        """Fraction of the original blocks' linear parameters that is removed."""
        return (self.original_parameters - self.parameters_after) / self.linear_parameters

    @property
    def kinds(self) -> set[str]:
        """Kinds of the pairs that are, or will be, cut, and ``"uneven"`` if blocks have different FFN widths."""
        kinds = {pair.kind for block in self.pairs for pair in block if pair.after < pair.original}
        adaptive = self.allocation == "adaptive" and self.parameters_after < self.parameters_before
        ffns = {pair.after for block in self.pairs for pair in block if pair.kind == "ffn"}
        return kinds | {"uneven"} if adaptive or len(ffns) > 1 else kinds

    @property
    def sparsity_total(self) -> float:
        """Fraction of all original parameters that is removed."""
        return 1 - self.parameters_after / self.original_parameters


def plan_widths(model: PreTrainedModel, config: PruningConfig) -> WidthPlan:
    """Decide the widths; needs shapes only, so the model may be on the ``meta`` device.

    P_all counts the blocks' linear parameters, c_p the parameters of one unit of pair p. R = sparsity · P_all and
    r = R / Σ n_p c_p over the pairs to be pruned. Value pairs lose round(r · head size) dims in each KV head, or that
    share of all dims with ``head_balance="free"``; of KV groups as many go as are nearest to r. The FFN pair takes up
    what is left of the block's share, to the nearest column and then to the nearest multiple.

    Args:
        model: A causal LM, pruned before or not; sparsity counts from the original.
        config: ``sparsity``, ``attention``, ``head_balance``, ``allocation`` and ``multiple_of`` are read.

    Raises:
        ValueError: If the sparsity cannot be reached with what is to be kept (the message gives the highest that
            can), lies below what is pruned already, ``multiple_of`` exceeds the FFN width, or ``attention`` or
            ``head_balance`` do not fit the family or what was cut before.
    """
    plan = _plan(model, config)
    gone = plan.original_parameters > plan.parameters_before
    newly = plan.parameters_before > plan.parameters_after
    if not gone and not newly and config.sparsity and config.multiple_of > 1:
        raise ValueError(
            f"multiple_of must be small enough for a cut of {config.sparsity}, got {config.multiple_of}: "
            "rounded to it, no width changes"
        )
    if gone and not newly:
        raise ValueError(f"sparsity must exceed {plan.sparsity:.4f}, which is pruned already, got {config.sparsity}")
    return plan


def is_reached(model: PreTrainedModel, config: PruningConfig) -> bool:
    """Whether a model is pruned that far already, so that :func:`plan_widths` would refuse to prune it further."""
    plan = _plan(model, config)
    return plan.original_parameters > plan.parameters_before == plan.parameters_after


def present_widths(model: PreTrainedModel) -> WidthPlan:
    """The widths of a model as it is: nothing is to be cut."""
    return _plan(model, PruningConfig(sparsity=0.0, attention="none"))


def _plan(model: PreTrainedModel, config: PruningConfig) -> WidthPlan:
    pairs = resolve_pruned(model, kv_groups=config.attention == "kv_groups")
    attention = _decide_attention(pairs, config.attention)
    pruned = {"value_dims": {"ffn", "value"}, "kv_groups": {"ffn", "groups"}, "none": {"ffn"}}[attention]
    counts = _group_counts(model, pairs) if attention == "kv_groups" else []
    if attention == "value_dims" and config.head_balance == "even":
        _require_even(pairs)
    gone = sum(_removed(pair) for block in pairs for pair in block)
    total = linear_parameters(model, spec_for(model)) + gone
    share = _share(pairs, pruned, config, total, counts)
    groups = _groups_left(pairs[0], counts, share, config) if counts else 0
    widths = tuple(tuple(_block_widths(block, pruned, share, config, groups)) for block in pairs)
    parameters = parameter_count(model)
    newly = sum((pair.before - pair.after) * pair.cost for block in widths for pair in block)
    if config.allocation == "adaptive":  # the sum alone is known: what the uniform widths are rounded to is not
        steps = (step_units(pair, config) * pair.column_cost for block in pairs for pair in block)
        newly = round(config.sparsity * total) - gone
        if newly <= max(steps) / 2:
            newly, widths = 0, tuple(tuple(replace(pair, after=pair.before) for pair in block) for block in widths)
    return WidthPlan(widths, total, parameters + gone, parameters, parameters - newly, attention, config.allocation)


def _decide_attention(pairs: list[list[ResolvedPair]], attention: str) -> str:
    value = [pair for block in pairs for pair in block if pair.spec.kind == "value"]
    if attention == "value_dims" and any(pair.spec.kind == "groups" for pair in pairs[0]):
        raise ValueError(
            "attention='value_dims' cannot follow 'kv_groups' on the same model, whose plan counts in KV groups; "
            "go on with 'kv_groups' or 'none', or prune the original model"
        )
    if attention == "value_dims" and not value:
        raise ValueError(
            "attention='value_dims' needs a value pair in the architecture's row, which has none; use 'none'"
        )
    if attention == "auto":
        return "value_dims" if value and all(pair.layout.repeats == 1 for pair in value) else "none"
    return attention


def _require_even(pairs: list[list[ResolvedPair]]) -> None:
    for pair in (pair for block in pairs for pair in block if pair.spec.kind == "value"):
        dims = torch.bincount(pair.kept // pair.layout.size, minlength=pair.layout.groups)
        if dims.min() < dims.max():
            raise ValueError(
                "head_balance must be 'free' where KV heads keep different numbers of value dims, got 'even': those of "
                f"{pair.name} keep {', '.join(map(str, dims.tolist()))}"
            )


def _group_counts(model: PreTrainedModel, pairs: list[list[ResolvedPair]]) -> list[int]:
    """Numbers of KV groups that the model's config can hold, ascending, the present one last."""
    spec, attention = spec_for(model), [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    layout, left = attention[0].layout, max(pair.kept.numel() for pair in attention)
    fewer = [count for count in range(1, left) if accepts(model.config, stock_fields(spec, layout, count))]
    return [*fewer, left]


def _groups_left(block: list[ResolvedPair], counts: list[int], share: float, config: PruningConfig) -> int:
    """The number of KV groups nearest to their share with which the FFN can take up the rest of a block's."""
    wanted = share * sum(pair.layout.width * pair.column_cost for pair in block)
    groups = next(pair for pair in block if pair.spec.kind == "groups")
    found = []
    for count in counts:
        rest = wanted - (groups.layout.width - count) * groups.column_cost
        lowest, highest = -0.5, math.inf  # without an FFN, nothing takes up the rest
        for ffn in (pair for pair in block if pair.spec.kind == "ffn"):
            lowest, highest = -ffn.column_cost / 2, (ffn.layout.width - config.multiple_of) * ffn.column_cost
        if rest <= highest and (rest >= lowest or count == counts[-1]):
            found.append(count)
    if not found:
        raise ValueError(
            f"sparsity must be one that whole KV groups and the FFN make up together, got {config.sparsity}: stock "
            f"code can hold {', '.join(map(str, counts))} of {groups.layout.width} groups; use 'value_dims' or 'none'"
        )
    return min(found, key=lambda count: (abs(count - (1 - share) * groups.layout.width), -count))


def step_units(pair: ResolvedPair, config: PruningConfig) -> int:
    """Units of a pair that go at a time: one value dim of every head that is kept even, ``multiple_of`` FFN units.

    Args:
        pair: The pair.
        config: ``head_balance`` and ``multiple_of`` are read.
    """
    if pair.spec.kind == "ffn":
        return config.multiple_of
    return pair.layout.groups if config.head_balance == "even" else 1


def _removed(pair: ResolvedPair) -> int:
    return (pair.layout.width - pair.kept.numel()) * pair.column_cost


def _share(
    pairs: list[list[ResolvedPair]], pruned: set[str], config: PruningConfig, total: int, counts: list[int]
) -> float:
    """r = R / Σ n_p c_p: the fraction that each pair to be pruned loses; below 1, since each keeps something."""
    removable = sum(
        (pair.layout.width - _least(pair, config, counts)) * pair.column_cost
        if pair.spec.kind in pruned
        else _removed(pair)
        for block in pairs
        for pair in block
    )
    if config.sparsity * total > removable:
        highest = math.floor(removable / total * 1e4) / 1e4
        kept = "queries and keys" if "value" in pruned else f"{counts[0]} KV groups" if counts else "the attention"
        raise ValueError(f"sparsity must be at most {highest} with {kept} kept, got {config.sparsity}")
    sizes = [sum(pair.layout.width * pair.column_cost for pair in block if pair.spec.kind in pruned) for block in pairs]
    return _level(config.sparsity * total, sizes, [sum(map(_removed, block)) for block in pairs])


def _level(wanted: float, sizes: list[int], gone: list[int]) -> float:
    """The share r with Σ max(r · size, gone) = wanted: blocks that have lost more before leave less to the others."""
    blocks = set(range(len(sizes)))
    while True:
        others = sum(gone) - sum(gone[block] for block in blocks)
        share = (wanted - others) / sum(sizes[block] for block in blocks)
        beyond = {block for block in blocks if gone[block] > share * sizes[block]}
        if not beyond or beyond == blocks:
            return share
        blocks -= beyond


def _least(pair: ResolvedPair, config: PruningConfig, counts: list[int]) -> int:
    """Fewest units that are left: one value dim in each KV head, one step of the FFN width."""
    if pair.spec.kind == "value":
        return pair.layout.groups
    if pair.spec.kind == "groups":
        return counts[0]
    if config.multiple_of > pair.layout.width:
        raise ValueError(f"multiple_of must be at most the FFN width {pair.layout.width}, got {config.multiple_of}")
    return config.multiple_of


def _block_widths(
    block: list[ResolvedPair], pruned: set[str], share: float, config: PruningConfig, groups: int
) -> list[PairWidth]:
    wanted = share * sum(pair.layout.width * pair.column_cost for pair in block if pair.spec.kind in pruned)
    widths = []
    for pair in block:  # the FFN is the last: it takes up what is left
        kind, layout, before = pair.spec.kind, pair.layout, pair.kept.numel()
        left = layout.width
        if kind == "ffn":
            left = _ffn_width(pair, wanted, config.multiple_of)
        elif kind in pruned:
            left = groups if kind == "groups" else left - _value_dims(layout, share, config.head_balance)
        left = min(left, before)
        wanted -= (layout.width - left) * pair.column_cost
        name, cost = f"{pair.name}.{pair.spec.consumer}", pair.column_cost
        widths.append(PairWidth(name, kind, layout.width, before, left, pair.columns, cost, layout.head_size))
    return widths


def _value_dims(layout: PairLayout, share: float, head_balance: str) -> int:
    """How many value dims go; at least one a KV head is left."""
    heads = layout.groups if head_balance == "even" else 1
    return min(heads * round(share * layout.width / heads), layout.width - layout.groups)


def _ffn_width(pair: ResolvedPair, wanted: float, multiple_of: int) -> int:
    width = pair.layout.width
    left = width - round(max(wanted, 0.0) / pair.column_cost)
    if left < width:
        left = max(multiple_of, round(left / multiple_of) * multiple_of)
    return max(1, min(left, width))
