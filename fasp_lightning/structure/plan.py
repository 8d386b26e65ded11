"""The one outcome that checkpoint, resume and export share: which units are left, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.cuts import Cuts
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import Kept, resolve
from fasp_lightning.structure.spec import ArchitectureSpec
from fasp_lightning.structure.stock_fields import describe, groups_obstacle, stock_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1

Widths = dict[str, tuple[PairLayout, list[int]]]
"""Consumer path → layout, and the units that each block has of it."""


@dataclass(frozen=True)
class PairPlan:
    """One pair of one block.

    Attributes:
        layout: Numbering of the original pair.
        kept: Units that are left, ascending, in that numbering.
    """

    layout: PairLayout
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """Kept units of a whole model. Plain data: JSON in both directions, no tensors.

    Attributes:
        model_type: The family, ``config.model_type``.
        blocks: One mapping a decoder block: consumer path → :class:`PairPlan`. Pairs that were not cut are absent.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, PruningPlan
        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        assert PruningPlan.from_json(model.fasp_plan.to_json()) == model.fasp_plan
    """

    model_type: str
    blocks: tuple[dict[str, PairPlan], ...]

    @property
    def widths(self) -> Widths:
        """Units left of each pair that is cut in some block."""
        layouts = {path: pair.layout for block in self.blocks for path, pair in block.items()}
        return {
            path: (layout, [len(block[path].kept) if path in block else layout.width for block in self.blocks])
            for path, layout in layouts.items()
        }

    @property
    def cuts(self) -> Cuts:
        """What is cut."""
        uneven = any(layout.kind != "value" and len(set(units)) > 1 for layout, units in self.widths.values())
        return Cuts(frozenset(layout.kind for layout, _ in self.widths.values()), uneven)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        blocks = [{path: _plain(pair) for path, pair in block.items()} for block in self.blocks]
        return {"version": VERSION, "model_type": self.model_type, "blocks": blocks}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            FaspError: If ``data`` is not a plan, or one of another version.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise FaspError(f"a plan must be a mapping with version {VERSION}, got {str(data)[:60]!r}")
        try:
            blocks = tuple({path: _pair_plan(pair) for path, pair in block.items()} for block in data["blocks"])
            return cls(data["model_type"], blocks)
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"a plan must hold model_type, blocks and the layout of each pair; missing: {error}"
            raise FaspError(reason) from None

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            FaspError: If the text is not the JSON of a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FaspError(f"a plan must be JSON, got {text[:60]!r}: {error}") from None
        return cls.from_dict(data)

    def kept(self) -> list[Kept]:
        """The plan as :func:`~fasp_lightning.structure.resolve.resolve` takes it."""
        return [
            {path: (pair.layout, torch.tensor(pair.kept, dtype=torch.long)) for path, pair in block.items()}
            for block in self.blocks
        ]


def _plain(pair: PairPlan) -> dict[str, Any]:
    return {**asdict(pair.layout), "producer_rows": list(pair.layout.producer_rows), "kept": list(pair.kept)}


def _pair_plan(data: dict[str, Any]) -> PairPlan:
    layout = {**data, "producer_rows": tuple(data["producer_rows"])}
    kept = tuple(layout.pop("kept"))
    if not all(type(unit) is int for unit in kept):  # a tensor of integers would round others, or not take them
        raise FaspError(f"a plan must keep units by their number, got {kept!s:.60}")
    return PairPlan(PairLayout(**layout), kept)


def plan_of(model: PreTrainedModel) -> PruningPlan | None:
    """The plan that a pruned model carries, or ``None``."""
    return getattr(model, "fasp_plan", None)


def resolve_pruned(model: PreTrainedModel, *, kv_groups: bool = False) -> list[list[ResolvedPair]]:
    """The pairs of a model that may carry a plan.

    Args:
        model: A causal LM.
        kv_groups: Let whole KV groups be the units of the attention; they are in any case where some are cut.

    Raises:
        FaspError: If a path or shape does not fit, or value dims are cut where KV groups are asked for.
    """
    plan, spec = plan_of(model), spec_for(model)
    kinds = plan.cuts.kinds if plan else frozenset()
    if kv_groups:
        _require_groups(model, spec, kinds)
    return resolve(model, spec, plan.kept() if plan else None, kv_groups or "groups" in kinds)


def _require_groups(model: PreTrainedModel, spec: ArchitectureSpec, kinds: frozenset[str]) -> None:
    obstacle = groups_obstacle(spec, model.config)
    if obstacle:
        reason = f"attention='kv_groups' cannot be used with {model.config.model_type}: {obstacle}"
        raise FaspError(f"{reason}; use 'value_dims' or 'none'")
    if "value" in kinds:
        raise FaspError(
            "attention='kv_groups' cannot follow 'value_dims' on the same model, whose heads are no longer whole; "
            "go on with 'value_dims' or 'none', or prune the original model"
        )


def record_plan(model: PreTrainedModel, pairs: list[list[ResolvedPair]]) -> PruningPlan:
    """Write what is left of ``pairs`` on the model as its plan, and the widths all blocks share into its config."""
    blocks = tuple(
        {
            pair.spec.consumer: PairPlan(pair.layout, tuple(pair.kept.tolist()))
            for pair in block
            if pair.kept.numel() < pair.layout.width
        }
        for block in pairs
    )
    plan = PruningPlan(model.config.model_type, blocks)
    model.fasp_plan = plan  # type: ignore[assignment]
    present = {
        first.spec.consumer: (first.layout, [first.kept.numel(), *(pair.kept.numel() for pair in rest)])
        for first, *rest in zip(*pairs, strict=True)  # one pair of every block
    }
    describe(model.config, config_fields(spec_for(model), present), (pair for block in pairs for pair in block))
    return plan


def config_fields(spec: ArchitectureSpec, widths: Widths) -> dict[str, int]:
    """Config values with which stock code builds these widths; the original one where blocks differ."""
    fields: dict[str, int] = {}
    for layout, units in widths.values():
        fields |= stock_fields(spec, layout, units[0] if len(set(units)) == 1 else layout.width)
    return fields


@own_modes()
def apply_plan(model: PreTrainedModel, plan: PruningPlan, *, wrap: bool = True) -> PreTrainedModel:
    """Give a model the shapes of a plan, in place. Nothing is restored: the weights kept are the model's own.

    Args:
        model: The original model (any device, ``meta`` included), or one pruned less far.
        plan: What to keep.
        wrap: See :meth:`fasp_lightning.structure.pair.ResolvedPair.cut`.

    Returns:
        The same model, which now carries the plan.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes, or keeps a unit that is gone.

    Example::
        from fasp_lightning import FASPPruner, PruningConfig, apply_plan, load_model
        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        same_shapes = apply_plan(load_model(name), model.fasp_plan)  # with the weights of ``name``, nothing restored
    """
    pairs = resolve_pruned(model, kv_groups="groups" in plan.cuts.kinds)
    wanted = targets(model, pairs, plan)
    for pair, kept in wanted:  # all are checked before the first is cut
        if not torch.isin(kept, pair.kept).all():
            raise FaspError(_bad_units(pair, pair.kept.numel()))
    for pair, kept in wanted:
        pair.cut(kept, wrap=wrap)
    record_plan(model, pairs)
    return model


@own_modes()
def conform(model: PreTrainedModel, plan: PruningPlan | None) -> PreTrainedModel:
    """Give a model a plan's shapes, whatever it had: parameters keep their identity, units that come back are zero.

    Args:
        model: A model of the plan's family.
        plan: The plan of the weights that are loaded next, or ``None`` for the original shapes.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes.
    """
    plan = plan or PruningPlan(model.config.model_type, tuple({} for _ in resolve_pruned(model)))
    _change_units(model, plan)
    pairs = resolve_pruned(model, kv_groups="groups" in plan.cuts.kinds)
    for pair, kept in targets(model, pairs, plan):
        if not torch.isin(kept, pair.kept).all():
            pair.widen()
        pair.cut(kept)
    record_plan(model, pairs)
    return model


def _change_units(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Give a model its whole attention back, if it is cut in other units than the plan's."""
    present, other = plan_of(model), "value" if "groups" in plan.cuts.kinds else "groups"
    if present is None or other not in present.cuts.kinds:
        return
    pairs = resolve_pruned(model)
    for pair in (pair for block in pairs for pair in block if pair.spec.inside_attention):
        pair.widen()
    record_plan(model, pairs)


def targets(
    model: PreTrainedModel, pairs: list[list[ResolvedPair]], plan: PruningPlan
) -> list[tuple[ResolvedPair, torch.Tensor]]:
    """Each pair with the units that the plan keeps of it.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes.
    """
    if plan.model_type != model.config.model_type:
        raise FaspError(f"plan must be one of a {model.config.model_type} model, got one of {plan.model_type!r}")
    if len(plan.blocks) != len(pairs):
        raise FaspError(f"plan must have {len(pairs)} blocks as the model has, got {len(plan.blocks)}")
    return [
        (pair, _target(pair, block.get(pair.spec.consumer)))
        for resolved, block in zip(pairs, plan.blocks, strict=True)
        for pair in _require_consumers(resolved, block)
    ]


def _require_consumers(pairs: list[ResolvedPair], block: dict[str, PairPlan]) -> list[ResolvedPair]:
    """The pairs of a block, if the plan names no other."""
    unknown = set(block) - {pair.spec.consumer for pair in pairs}
    if unknown:
        raise FaspError(f"plan of {pairs[0].name} must name its consumers, got {', '.join(sorted(unknown))}")
    return pairs


def _target(pair: ResolvedPair, planned: PairPlan | None) -> torch.Tensor:
    """Units to keep; all of them if the plan has nothing on this pair."""
    if planned is not None and planned.layout != pair.layout:
        raise FaspError(f"plan of {pair.layer} must be for {pair.layout}, got {planned.layout}")
    kept = torch.tensor(planned.kept if planned else range(pair.layout.width), dtype=torch.long)
    inside = kept.numel() and kept[0] >= 0 and kept[-1] < pair.layout.width
    if not inside or not (kept[1:] > kept[:-1]).all():
        raise FaspError(_bad_units(pair, pair.layout.width))
    return kept


def _bad_units(pair: ResolvedPair, width: int) -> str:
    return f"plan of {pair.layer} must keep ascending units out of the {width} that are left"
