"""How many units each pair keeps: exact arithmetic before any computing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.shares import removed, units_left
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.linears import linear_parameters, parameter_count
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.stock_fields import accepts, stock_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRUNED = {"value_dims": {"ffn", "value"}, "kv_groups": {"ffn", "groups"}, "none": {"ffn"}}
"""Kinds of pairs that are cut, by what is done with the attention."""

SHARED = "groups"
"""The kind that never differs between blocks: the number of KV groups stands in the config once for all."""


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

    @property
    def dims_left(self) -> int:
        """Hidden units or value dims after it, also where whole KV groups are cut."""
        return self.after * self.head_size if self.kind == "groups" else self.after

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

    def decided_later(self, kind: str) -> bool:
        """Whether the widths of a kind of pair differ between blocks by what calibration will tell."""
        return self.allocation == "adaptive" and kind != SHARED and self.changes

    @property
    def changes(self) -> bool:
        """Whether anything is to be cut: nothing is where all widths are rounded to what they are."""
        return self.parameters_after < self.parameters_before

    @property
    def sparsity(self) -> float:
        """Fraction of the original blocks' linear parameters that is removed."""
        return (self.original_parameters - self.parameters_after) / self.linear_parameters

    @property
    def kinds(self) -> set[str]:
        """Kinds of the pairs that are, or will be, cut, and ``"uneven"`` if blocks have different FFN widths."""
        kinds = {pair.kind for block in self.pairs for pair in block if pair.after < pair.original}
        ffns = {pair.after for block in self.pairs for pair in block if pair.kind == "ffn"}
        return kinds | {"uneven"} if self.decided_later("ffn") or len(ffns) > 1 else kinds

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
        FaspError: If the sparsity cannot be reached with what is to be kept (the message gives the highest that
            can), lies below what is pruned already, ``multiple_of`` exceeds the FFN width, or ``attention`` or
            ``head_balance`` do not fit the family or what was cut before.
    """
    plan = widths_towards(model, config)
    gone = plan.original_parameters > plan.parameters_before
    if not gone and not plan.changes and config.sparsity and config.multiple_of > 1:
        raise FaspError(
            f"multiple_of must be small enough for a cut of {config.sparsity}, got {config.multiple_of}: "
            "rounded to it, no width changes"
        )
    if gone and not plan.changes:
        raise FaspError(f"sparsity must exceed {plan.sparsity:.4f}, which is pruned already, got {config.sparsity}")
    return plan


def is_reached(model: PreTrainedModel, config: PruningConfig) -> bool:
    """Whether a model is pruned that far already, so that :func:`plan_widths` would refuse to prune it further."""
    plan = widths_towards(model, config)
    return plan.original_parameters > plan.parameters_before and not plan.changes


def present_widths(model: PreTrainedModel) -> WidthPlan:
    """The widths of a model as it is: nothing is to be cut."""
    return widths_towards(model, PruningConfig(sparsity=0.0, attention="none"))


def widths_towards(model: PreTrainedModel, config: PruningConfig) -> WidthPlan:
    """As :func:`plan_widths`, but a plan that changes nothing is no error: it may be one of several steps.

    Args:
        model: As there.
        config: As there.

    Raises:
        FaspError: As there, but for that.
    """
    pairs = resolve_pruned(model, kv_groups=config.attention == "kv_groups")
    attention = _decide_attention(pairs, config.attention)
    if attention == "value_dims" and config.head_balance == "even":
        _require_even(pairs)
    pruned = PRUNED[attention]
    counts = _group_counts(model, pairs) if attention == "kv_groups" else []
    gone = sum(removed(pair) for block in pairs for pair in block)
    total = linear_parameters(model, spec_for(model)) + gone
    left = units_left(pairs, pruned, config, total, counts)
    widths = tuple(tuple(map(_width, block, units)) for block, units in zip(pairs, left, strict=True))
    parameters = parameter_count(model)
    newly = sum((pair.before - pair.after) * pair.cost for block in widths for pair in block)
    if config.allocation == "adaptive":  # the sum alone is known: what the uniform widths are rounded to is not
        decided = [pair for block in pairs for pair in block if pair.spec.kind in pruned - {SHARED}]
        newly = round(config.sparsity * total) - gone
        if newly <= max(step_units(pair, config) * pair.column_cost for pair in decided) / 2:
            newly, widths = 0, tuple(tuple(replace(pair, after=pair.before) for pair in block) for block in widths)
    return WidthPlan(widths, total, parameters + gone, parameters, parameters - newly, attention, config.allocation)


def _width(pair: ResolvedPair, left: int) -> PairWidth:
    return PairWidth(
        layer=pair.layer,
        kind=pair.spec.kind,
        original=pair.layout.width,
        before=pair.kept.numel(),
        after=left,
        columns=pair.columns,
        cost=pair.column_cost,
        head_size=pair.layout.head_size,
    )


def _decide_attention(pairs: list[list[ResolvedPair]], attention: str) -> str:
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


def _require_even(pairs: list[list[ResolvedPair]]) -> None:
    for pair in (pair for block in pairs for pair in block if pair.spec.kind == "value"):
        dims = torch.bincount(pair.kept // pair.layout.size, minlength=pair.layout.groups)
        if dims.min() < dims.max():
            raise FaspError(
                "head_balance must be 'free' where KV heads keep different numbers of value dims, got 'even': those of "
                f"{pair.name} keep {', '.join(map(str, dims.tolist()))}"
            )


def _group_counts(model: PreTrainedModel, pairs: list[list[ResolvedPair]]) -> list[int]:
    """Numbers of KV groups that the model's config can hold, ascending, the present one last."""
    spec, attention = spec_for(model), [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    layout, left = attention[0].layout, max(pair.kept.numel() for pair in attention)
    fewer = [count for count in range(1, left) if accepts(model.config, stock_fields(spec, layout, count))]
    return [*fewer, left]


def step_units(pair: ResolvedPair, config: PruningConfig) -> int:
    """Units of a pair that go at a time: one value dim of every head that is kept even, ``multiple_of`` FFN units.

    Args:
        pair: The pair.
        config: ``head_balance`` and ``multiple_of`` are read.
    """
    if pair.spec.kind == "ffn":
        return config.multiple_of
    return pair.layout.groups if config.head_balance == "even" else 1
