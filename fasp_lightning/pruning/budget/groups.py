"""How many whole KV groups stay, and what the FFNs lose beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.rounding import FFNS, ffn_widths, step_units, together
from fasp_lightning.pruning.budget.shares import level, removed, size_of
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.configs.stock_fields import accepts, stock_fields
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = list[list[ResolvedPair]]
"""The pairs of each block."""


def groups_left(pairs: Pairs, counts: list[int], share: float, total: int, config: PruningConfig) -> int:
    """The number of KV groups nearest to their share with which the FFNs can take up the rest."""
    layout = next(pair.layout for block in pairs for pair in block if pair.spec.kind == "groups")
    ffns = [pair for block in pairs for pair in block if pair.spec.kind in FFNS]
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


def with_groups(pairs: Pairs, count: int, total: int, config: PruningConfig) -> list[list[int]]:
    """What each pair keeps when so many KV groups are left, and all FFNs lose the same share of the rest."""
    ffns = [pair for block in pairs for pair in block if pair.spec.kind in FFNS]
    rest = _beside_groups(pairs, count, total, config)
    share = level(rest, [size_of(pair) for pair in ffns], [removed(pair) for pair in ffns])

    def left(block: list[ResolvedPair]) -> list[int]:
        units = [count for _ in block]
        for places in together(block):
            alike = [block[place] for place in places]
            if alike[0].spec.kind in FFNS:
                found = ffn_widths(alike, share * sum(map(size_of, alike)), config)
                units = [dict(zip(places, found, strict=True)).get(place, old) for place, old in enumerate(units)]
        return [min(some, pair.kept.numel()) for some, pair in zip(units, block, strict=True)]

    return list(map(left, pairs))


def group_counts(model: PreTrainedModel, pairs: Pairs) -> list[int]:
    """Numbers of KV groups that the model's config can hold, ascending, the present one last."""
    spec, attention = spec_for(model), [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    layout, left = attention[0].layout, max(pair.kept.numel() for pair in attention)
    path = attention[0].spec.consumer
    fewer = [
        count for count in range(1, left) if accepts(text_config(model.config), stock_fields(spec, path, layout, count))
    ]
    return [*fewer, left]
