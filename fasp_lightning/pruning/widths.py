"""How many units each pair keeps: exact arithmetic before any computing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.plan import resolve_pruned
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.linears import linear_parameters, parameter_count
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PairWidth:
    """Width of one pair, in units (hidden units of the FFN, value dims over all KV heads).

    Attributes:
        layer: Path of the consumer, from the causal LM.
        kind: ``"ffn"`` or ``"value"``.
        original: Units of the original model.
        before: Units before this pruning.
        after: Units after it.
        columns: Columns of the consumer before this pruning: the size of its gram matrix.
        cost: Parameters that go with one unit.
    """

    layer: str
    kind: str
    original: int
    before: int
    after: int
    columns: int
    cost: int


@dataclass(frozen=True)
class WidthPlan:
    """Widths of a whole model and what they amount to.

    Attributes:
        pairs: One tuple a block.
        linear_parameters: P_all, the linear parameters in the blocks of the original model.
        original_parameters: All parameters of the original model; tied ones count once.
        parameters_before: All parameters before this pruning.
        parameters_after: All parameters after it.
        attention: ``"value_dims"`` or ``"none"``, as decided.
        allocation: As asked. With ``"adaptive"`` the widths of single blocks are not known before calibration, and
            ``pairs`` are the uniform ones of the same sum.
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
    share of all dims with ``head_balance="free"``; the FFN pair takes up what is left of the block's share, to the
    nearest column and then to the nearest multiple.

    Args:
        model: A causal LM, pruned before or not; sparsity counts from the original.
        config: ``sparsity``, ``attention``, ``head_balance``, ``allocation`` and ``multiple_of`` are read.

    Raises:
        ValueError: If the sparsity cannot be reached with queries and keys kept (the message gives the highest
            that can), lies below what is pruned already, or ``multiple_of`` exceeds the FFN width.
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
    pairs = resolve_pruned(model)
    attention = _decide_attention(pairs, config.attention)
    pruned = {"ffn", "value"} if attention == "value_dims" else {"ffn"}
    gone = sum(_removed(pair) for block in pairs for pair in block)
    total = linear_parameters(model, spec_for(model)) + gone
    share = _share(pairs, pruned, config, total)
    widths = tuple(tuple(_block_widths(block, pruned, share, config)) for block in pairs)
    parameters = parameter_count(model)
    newly = sum((pair.before - pair.after) * pair.cost for block in widths for pair in block)
    return WidthPlan(widths, total, parameters + gone, parameters, parameters - newly, attention, config.allocation)


def _decide_attention(pairs: list[list[ResolvedPair]], attention: str) -> str:
    value = [pair for block in pairs for pair in block if pair.spec.kind == "value"]
    if attention == "value_dims" and not value:
        raise ValueError(
            "attention='value_dims' needs a value pair in the architecture's row, which has none; use 'none'"
        )
    if attention == "auto":
        return "value_dims" if value and all(pair.layout.repeats == 1 for pair in value) else "none"
    return attention


def _removed(pair: ResolvedPair) -> int:
    return (pair.layout.width - pair.kept.numel()) * pair.column_cost


def _share(pairs: list[list[ResolvedPair]], pruned: set[str], config: PruningConfig, total: int) -> float:
    """r = R / Σ n_p c_p: the fraction that each pair to be pruned loses; below 1, since each keeps something."""
    cut = [pair for block in pairs for pair in block if pair.spec.kind in pruned]
    removable = sum((pair.layout.width - _least(pair, config.multiple_of)) * pair.column_cost for pair in cut)
    if config.sparsity * total > removable:
        highest = math.floor(removable / total * 1e4) / 1e4
        kept = "queries and keys" if "value" in pruned else "the attention"
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


def _least(pair: ResolvedPair, multiple_of: int) -> int:
    """Fewest units that are left: one value dim in each KV head, one step of the FFN width."""
    if pair.spec.kind == "value":
        return pair.layout.groups
    if multiple_of > pair.layout.width:
        raise ValueError(f"multiple_of must be at most the FFN width {pair.layout.width}, got {multiple_of}")
    return multiple_of


def _block_widths(
    block: list[ResolvedPair], pruned: set[str], share: float, config: PruningConfig
) -> list[PairWidth]:
    wanted = share * sum(pair.layout.width * pair.column_cost for pair in block if pair.spec.kind in pruned)
    widths = []
    for pair in block:  # value before ffn: the FFN takes up what is left
        before = pair.kept.numel()
        if pair.spec.kind == "value":
            left = pair.layout.width
            if "value" in pruned:
                left -= _value_dims(pair.layout, share, config.head_balance)
        else:
            left = _ffn_width(pair, wanted, config.multiple_of)
        left = min(left, before)
        wanted -= (pair.layout.width - left) * pair.column_cost
        name = f"{pair.name}.{pair.spec.consumer}"
        cost = pair.column_cost
        widths.append(PairWidth(name, pair.spec.kind, pair.layout.width, before, left, pair.columns, cost))
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
