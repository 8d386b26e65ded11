"""The plan that a model's config carries, which every way of saving copies, and the shapes that it gives the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.configs.stock_fields import (
    form_in_memory,
    groups_obstacle,
    own_config,
    parts_left,
    stock_fields,
)
from fasp_lightning.structure.configs.text_part import text_config, text_family
from fasp_lightning.structure.layout import Widths
from fasp_lightning.structure.modes import own_modes, undone
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan, bad_units, targets
from fasp_lightning.structure.registry import carried_row, spec_for
from fasp_lightning.structure.resolve import Kept, columns_at, find_blocks, has_pair, resolve
from fasp_lightning.structure.spec import WHOLE, ArchitectureSpec, CoupledPair
from fasp_lightning.structure.transaction import all_or_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "save the pruned model again, or set config.fasp to None to count this one as whole"


def plan_of(model: PreTrainedModel) -> PruningPlan | None:
    """The plan that a pruned model carries in its config, or ``None``.

    Raises:
        FaspError: As :func:`plan_in`.
    """
    return plan_in(getattr(model, "config", None))


def plan_in(config: Any) -> PruningPlan | None:
    """The plan that a config carries as its field ``fasp``, or ``None``.

    Beside the plan that field holds the form of the weights: ``"stock"``, ``"compact"`` or ``"zero_filled"``.

    Raises:
        FaspError: If that is no plan, or one of another family.
    """
    data = getattr(config, "fasp", None)
    if data is None:
        return None
    try:
        plan = PruningPlan.from_dict(data)
    except FaspError as error:
        raise FaspError(f"config.fasp is damaged: {error}; {REMEDY}") from None
    if plan.model_type != text_family(config):
        kind = f"the plan of a {text_family(config)} model"
        raise FaspError(f"config.fasp must be {kind}, got one of {plan.model_type!r}; {REMEDY}")
    return plan


def resolve_pruned(model: PreTrainedModel, *, whole: Collection[str] = ()) -> list[list[ResolvedPair]]:
    """The pairs of a model that may carry a plan.

    Args:
        model: A causal LM.
        whole: See :func:`~fasp_lightning.structure.resolve.resolve`; the units of pairs that are cut stay in any case.

    Raises:
        FaspError: If a path or shape does not fit, or value dims are cut where KV groups are asked for, or hidden units
            of experts where whole ones are, or the other way round.
    """
    plan, spec = plan_of(model), spec_for(model)
    kinds = plan.cuts.kinds if plan else frozenset()
    if "groups" in whole:
        _require_groups(model, spec, kinds)
    if "whole_experts" in whole and "experts" in kinds:
        raise FaspError(
            "experts='whole' cannot follow 'columns' on the same model, whose plan counts in hidden units of experts; "
            "go on with 'columns', or prune the original model"
        )
    return resolve(model, spec, plan.kept() if plan else None, {*whole, *kinds})


def _require_groups(model: PreTrainedModel, spec: ArchitectureSpec, kinds: frozenset[str]) -> None:
    if obstacle := groups_obstacle(spec, text_config(model.config)):
        reason = f"attention='kv_groups' cannot be used with {text_family(model.config)}: {obstacle}"
        raise FaspError(f"{reason}; use 'value_dims' or 'none'")
    if "value" in kinds:
        raise FaspError(
            "attention='kv_groups' cannot follow 'value_dims' on the same model, whose heads are no longer whole; "
            "go on with 'value_dims' or 'none', or prune the original model"
        )


def record_plan(model: PreTrainedModel, pairs: list[list[ResolvedPair]]) -> PruningPlan:
    """Write what is left of ``pairs`` on the model as its plan, and the widths all blocks share into its config."""
    flat = [pair for block in pairs for pair in block]
    cut = {pair.spec.consumer for pair in flat if pair.kept.numel() < pair.layout.width}
    blocks = tuple({pair.spec.consumer: _planned(pair) for pair in block} for block in pairs)
    whole = PruningPlan(text_family(model.config), blocks)
    plan = whole.of(cut)
    spec, config = spec_for(model), own_config(model)
    model.fasp_plan = plan  # type: ignore[assignment]  # for the user to read; what counts is the config
    row = carried_row(plan.model_type, spec_for(config))
    config.fasp = {"form": form_in_memory(spec, plan), **plan.to_dict(), **row}
    for name, value in config_fields(spec, whole.widths).items():
        setattr(text_config(config), name, value)
        if hasattr(model, name):  # the count of experts, for the loss that balances them
            setattr(model, name, value)
    for pair in flat:
        pair.set_heads()  # those of blocks that do not have the config's
    return plan


def _planned(pair: ResolvedPair) -> PairPlan:
    return PairPlan(pair.layout, tuple(pair.kept.tolist()))


@contextmanager
def recorded(model: PreTrainedModel, pairs: list[list[ResolvedPair]]) -> Iterator[None]:
    """Whatever stops what changes pairs inside, a Ctrl-C included, the model's plan says what is left of them.

    It is written once, at the end: all pairs after each one would cost the square of their number. A model of which no
    pair was changed before an error stays as it was.
    """
    before = [(pair, pair.kept) for block in pairs for pair in block]
    whole = False

    def write() -> None:
        if whole or any(pair.kept is not kept for pair, kept in before):
            record_plan(model, pairs)

    with undone(write):
        yield
        whole = True


def config_fields(spec: ArchitectureSpec, widths: Widths) -> dict[str, int]:
    """Config values with which stock code builds these widths; the original one where blocks differ.

    Where blocks differ from the start, the config says so in a way of its own, and stays as it is.
    """
    fields: dict[str, int] = {}
    several = Counter(path for path, _ in widths)
    for path, layout in widths:
        if several[path] == 1:
            parts = parts_left(spec, widths, path, layout)
            left = int(parts.pop() * layout.width) if len(parts) == 1 else layout.width
            fields |= stock_fields(spec, path, layout, left)
    return fields


@own_modes()
def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Give a model the shapes of a plan, in place. Nothing is restored: the weights kept are the model's own.

    Args:
        model: The original model (any device, ``meta`` included), or one pruned less far.
        plan: What to keep.

    Returns:
        The same model, which now carries the plan.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes, or keeps a unit that is gone.

    Example::
        from fasp_lightning import FASPPruner, PruningConfig, apply_plan, load_model
        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        same_shapes = apply_plan(load_model(name), model.fasp_plan)  # with the weights of ``name``, nothing restored
    """
    _settle(model)
    pairs = resolve_pruned(model, whole=plan.cuts.kinds)
    wanted = targets(model, pairs, plan)
    for pair, kept in wanted:  # all are checked before the first is cut
        if not torch.isin(kept, pair.kept).all():
            raise FaspError(bad_units(pair, pair.kept.numel()))
    _change(model, pairs, [(pair, partial(pair.cut, kept)) for pair, kept in wanted])
    return model


def _change(
    model: PreTrainedModel, pairs: list[list[ResolvedPair]], changes: list[tuple[ResolvedPair, Callable[[], None]]]
) -> None:
    """Change pairs, each wholly or not at all; whatever stops it, the plan says which."""
    with recorded(model, pairs):
        for pair, change in changes:
            with all_or_nothing(pair):
                change()


def adopt_plan(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model that was built from its config alone, as stock code does it, the shapes of the plan in there.

    A zero-filled model that ``transformers`` loaded loses its zeros. One that has these shapes, or no plan, stays.

    Args:
        model: The model; on ``meta`` its weights are still to come.

    Returns:
        The same model.

    Raises:
        FaspError: If the plan does not fit the weights, or says that units are gone for which they hold values.
    """
    return _settle(model, check=True)


def _settle(model: PreTrainedModel, *, check: bool = False) -> PreTrainedModel:
    plan = plan_of(model)
    if plan is None:
        return model
    pairs = _as_built(model, plan)
    wider = [(pair, kept) for pair, kept in targets(model, pairs, plan) if kept.numel() < pair.kept.numel()]
    for pair, kept in wider if check else ():
        _require_zeros(pair, kept)
    if wider:
        _change(model, pairs, [(pair, partial(pair.cut, kept)) for pair, kept in wider])
    model.fasp_plan = plan  # type: ignore[assignment]
    return model


def _as_built(model: PreTrainedModel, plan: PruningPlan) -> list[list[ResolvedPair]]:
    """The pairs of a model, some of them wider than its plan has them."""
    spec = spec_for(model)
    blocks = find_blocks(model, spec)
    if len(plan.blocks) != len(blocks):
        kind = f"the plan of {len(blocks)} blocks as the model has"
        raise FaspError(f"config.fasp must be {kind}, got one of {len(plan.blocks)}; {REMEDY}")
    there: list[Kept] = [
        {
            pair.consumer: (planned.layout, _units_there(block, f"{spec.layers}.{index}", pair, planned, spec))
            for pair in spec.pairs
            if has_pair(block, pair) and (planned := cut.get(pair.consumer))
        }
        for index, (block, cut) in enumerate(zip(blocks, plan.blocks, strict=True))
    ]
    return resolve(model, spec, there, plan.cuts.kinds)


def _units_there(
    block: nn.Module, name: str, pair: CoupledPair, planned: PairPlan, spec: ArchitectureSpec
) -> torch.Tensor:
    """As many units as a consumer has columns of, the kept ones first; the kept ones if it has no more."""
    width, columns = planned.layout.width, columns_at(block, name, pair, spec.transposed)
    units = columns * width // planned.layout.columns(torch.arange(width)).numel()
    there = planned.padded(units) if len(planned.kept) < units <= width else planned
    return torch.tensor(there.kept, dtype=torch.long)


def _require_zeros(pair: ResolvedPair, kept: torch.Tensor) -> None:
    """Refuse to cut units that change the output."""
    gone = pair.kept[~torch.isin(pair.kept, kept)]
    columns = torch.searchsorted(pair.layout.columns(pair.kept), pair.layout.columns(gone))
    weight = pair.weight.detach()
    if not weight.is_meta and weight[:, columns.to(weight.device)].any():
        raise FaspError(
            f"{pair.layer} must have {kept.numel()} of {pair.layout.width} units as the plan in config.fasp has it, "
            f"got weights for {pair.kept.numel()}: the model was built from a pruned one's config. Load that one with "
            "load_pruned; give new weights its shapes with apply_plan; or set config.fasp to None if none are gone"
        )


@own_modes()
def conform(model: PreTrainedModel, plan: PruningPlan | None) -> PreTrainedModel:
    """Give a model a plan's shapes, whatever it had: parameters keep their identity, units that come back are zero.

    Args:
        model: A model of the plan's family.
        plan: The plan of the weights that are loaded next, or ``None`` for the original shapes.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes.
    """
    _settle(model)
    plan = plan or PruningPlan(text_family(model.config), tuple({} for _ in resolve_pruned(model)))
    _change_units(model, plan)
    pairs = resolve_pruned(model, whole=plan.cuts.kinds)
    wanted = targets(model, pairs, plan)
    widened = [(pair, pair.widen) for pair, kept in wanted if not torch.isin(kept, pair.kept).all()]
    _change(model, pairs, [*widened, *((pair, partial(pair.cut, kept)) for pair, kept in wanted)])
    return model


def _change_units(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Give a model its whole attention, or its whole experts, back if they are cut in other units than the plan's."""
    present = plan_of(model)
    others = {other for both in WHOLE.items() for own, other in (both, both[::-1]) if own in plan.cuts.kinds}
    others |= set(WHOLE.values()) - plan.cuts.kinds
    if present is None or not others & present.cuts.kinds:
        return
    pairs = resolve_pruned(model)
    _change(model, pairs, [(pair, pair.widen) for block in pairs for pair in block if pair.spec.kind in others])
