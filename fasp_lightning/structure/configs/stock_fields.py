"""What a stock config can say of a model's widths."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from fasp_lightning.errors import of_library
from fasp_lightning.structure.compact import BlockConfig
from fasp_lightning.structure.configs.text_part import with_fields
from fasp_lightning.structure.layout import Cuts, PairLayout, Widths
from fasp_lightning.structure.modes import insist
from fasp_lightning.structure.spec import ArchitectureSpec

if TYPE_CHECKING:
    from fasp_lightning.structure.pruning_plan import PruningPlan


def stock_fields(spec: ArchitectureSpec, consumer: str, layout: PairLayout, units: int) -> dict[str, int]:
    """Config values with which stock code builds a pair of so many units.

    Args:
        spec: The family's row.
        consumer: Path of the pair's consumer.
        layout: Layout of the pair.
        units: Its units in every block.

    Returns:
        Field → value; empty if stock code always builds the original width, or if the field is that of other pairs, in
        the ratio of whose widths it builds this one.
    """
    if layout.kind in ("ffn", "experts"):
        field = spec.width_field_of(consumer)
        owner = [pair.consumer for pair in spec.pairs if spec.width_field_of(pair.consumer) == field][-1]
        return {field: units // layout.groups} if field and owner == consumer else {}
    if layout.kind == "whole_experts":
        around = next(pair.experts for pair in spec.pairs if pair.consumer == consumer)
        return {around.count_field: units} if around else {}
    if layout.kind == "groups":  # the head size would otherwise be taken from the number of heads
        heads = {"num_attention_heads": units * layout.repeats, "num_key_value_heads": units}
        return {**heads, "head_dim": layout.head_size}
    return {}


def is_stock(spec: ArchitectureSpec, consumer: str, layout: PairLayout) -> bool:
    """Whether a stock config can say that a pair has fewer units."""
    return layout.kind != "value" and (layout.kind != "ffn" or spec.width_field_of(consumer) is not None)


def parts_left(spec: ArchitectureSpec, widths: Widths, consumer: str, layout: PairLayout) -> set[Fraction]:
    """Which parts of their units blocks have left of a pair, and of those whose width stands in the same config field.

    Args:
        spec: The family's row.
        widths: Of all pairs.
        consumer: Path of the pair's consumer.
        layout: Its layout.
    """
    field = spec.width_field_of(consumer) if layout.kind in ("ffn", "experts") else None
    alike = [
        (other, units)
        for (path, other), units in widths.items()
        if path == consumer or (field and other.kind in ("ffn", "experts") and spec.width_field_of(path) == field)
    ]
    return {Fraction(left, other.width) for other, units in alike for left in units.values()}


def cuts_in(spec: ArchitectureSpec, plan: PruningPlan) -> Cuts:
    """What a plan cuts, uneven too where pairs whose widths stand in one config field have lost different parts.

    Args:
        spec: The family's row.
        plan: The plan.
    """
    apart = (parts_left(spec, plan.widths, path, layout) for path, layout in plan.widths if layout.kind != "value")
    return plan.cuts | Cuts(uneven=any(len(parts) > 1 for parts in apart))


def stock_obstacle(spec: ArchitectureSpec, cuts: Cuts) -> str | None:
    """Why stock code cannot build a model in its cut shapes, or ``None`` if it can."""
    if "value" in cuts.kinds:
        return "stock attention has one head size for queries, keys and values"
    if "ffn" in cuts.kinds and spec.width_field is None:
        return "the FFN width is fixed in the model's code"
    if cuts.uneven:
        return "blocks have different FFN widths or numbers of experts, and the config holds one for all"
    return None


def form_in_memory(spec: ArchitectureSpec, plan: PruningPlan) -> str:
    """The form of a model that has the shapes of a plan: ``"stock"`` where stock code builds them, else ``"compact"``.

    Args:
        spec: The family's row.
        plan: The plan.
    """
    return "compact" if stock_obstacle(spec, cuts_in(spec, plan)) else "stock"


def accepts(config: Any, fields: dict[str, int]) -> bool:
    """Whether a config's class takes these values; some want the number of heads to divide the hidden size."""
    try:
        with_fields(config, fields)
    except Exception as error:  # config classes raise whatever their validators do
        if not of_library(error):
            raise
        return False
    return True


def groups_obstacle(spec: ArchitectureSpec, config: Any) -> str | None:
    """Why stock code could not hold a model with fewer KV groups, or ``None`` if it can.

    Args:
        spec: The family's row.
        config: The model's config.
    """
    value = [pair for pair in spec.pairs if pair.kind == "value"]
    if not value:
        return "its row has no value pair"
    if not value[0].groups:
        return "its stock code ties the size or the position bias of a head to the number of heads"
    if getattr(config, "qk_layernorm", False):
        return "qk_layernorm has norms of hidden_size / num_attention_heads"
    return None


def own_config(model: nn.Module) -> Any:
    """The model's config, from now on a copy: another model may have been built from the same one.

    All its modules see the copy, or none does, wherever a Ctrl-C comes.
    """
    copies: dict[int, Any] = {}  # of the config, and of those inside it, by what they are copies of
    own = copy.deepcopy(model.config, copies)

    def hand_out() -> None:
        for module in model.modules():
            seen: Any = getattr(module, "config", None)
            if isinstance(seen, BlockConfig):
                seen.shared = copies.get(id(seen.shared), seen.shared)
            elif id(seen) in copies:
                module.config = copies[id(seen)]

    insist(hand_out)
    return own
