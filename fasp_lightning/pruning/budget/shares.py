"""How the parameters that are to go are divided among blocks and pairs, and how many units each pair keeps then."""

from __future__ import annotations

import math

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.pair import ResolvedPair


def units_left(
    pairs: list[list[ResolvedPair]], pruned: set[str], config: PruningConfig, total: int, counts: list[int]
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
    share = _share(pairs, pruned, config, total, counts)
    if counts:
        return _with_groups(pairs, _groups_left(pairs, counts, share, total, config), total, config)
    return [_block_units(block, pruned, share, config) for block in pairs]


def removed(pair: ResolvedPair) -> int:
    """Parameters of a pair that are gone."""
    return (pair.layout.width - pair.kept.numel()) * pair.column_cost


def _size(pair: ResolvedPair) -> int:
    return pair.layout.width * pair.column_cost


def _share(
    pairs: list[list[ResolvedPair]], pruned: set[str], config: PruningConfig, total: int, counts: list[int]
) -> float:
    """r = R / Σ n_p c_p: the fraction that each pair to be pruned loses; below 1, since each keeps something."""
    removable = sum(
        (pair.layout.width - _least(pair, config, counts)) * pair.column_cost
        if pair.spec.kind in pruned
        else removed(pair)
        for block in pairs
        for pair in block
    )
    if config.sparsity * total > removable:
        highest = math.floor(removable / total * 1e4) / 1e4
        kept = "queries and keys" if "value" in pruned else f"{counts[0]} KV groups" if counts else "the attention"
        raise FaspError(f"sparsity must be at most {highest} with {kept} kept, got {config.sparsity}")
    sizes = [sum(_size(pair) for pair in block if pair.spec.kind in pruned) for block in pairs]
    return _level(config.sparsity * total, sizes, [sum(map(removed, block)) for block in pairs])


def _level(wanted: float, sizes: list[int], gone: list[int]) -> float:
    """The share r with Σ max(r · size, gone) = wanted: parts that have lost more before leave less to the others."""
    parts = {part for part, size in enumerate(sizes) if size}
    share = 0.0
    while parts:
        others = sum(gone) - sum(gone[part] for part in parts)
        share = (wanted - others) / sum(sizes[part] for part in parts)
        beyond = {part for part in parts if gone[part] > share * sizes[part]}
        if not beyond or beyond == parts:
            break
        parts -= beyond
    return share


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
    sizes = [_size(pair) if pair.spec.kind in pruned else 0 for pair in block]
    wanted = share * sum(sizes)
    share = _level(wanted, sizes, list(map(removed, block)))
    units = []
    for pair in block:
        left = pair.layout.width
        if pair.spec.kind == "ffn":
            left = _ffn_width(pair, wanted, config.multiple_of)
        elif pair.spec.kind in pruned:
            left -= _value_dims(pair.layout, share, config.head_balance)
        left = min(left, pair.kept.numel())
        wanted -= (pair.layout.width - left) * pair.column_cost
        units.append(left)
    return units


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


def _groups_left(
    pairs: list[list[ResolvedPair]], counts: list[int], share: float, total: int, config: PruningConfig
) -> int:
    """The number of KV groups nearest to their share with which the FFNs can take up the rest."""
    layout = next(pair.layout for pair in pairs[0] if pair.spec.kind == "groups")
    ffns = [pair for block in pairs for pair in block if pair.spec.kind == "ffn"]
    lowest = sum(removed(pair) - pair.column_cost / 2 for pair in ffns)
    highest = sum((pair.layout.width - config.multiple_of) * pair.column_cost for pair in ffns)
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


def _beside_groups(pairs: list[list[ResolvedPair]], count: int, total: int, config: PruningConfig) -> float:
    """Parameters that are to go from elsewhere when so many KV groups are left."""
    groups = [pair for block in pairs for pair in block if pair.spec.kind == "groups"]
    left = [min(count, pair.kept.numel()) for pair in groups]
    gone = sum((pair.layout.width - units) * pair.column_cost for pair, units in zip(groups, left, strict=True))
    return config.sparsity * total - gone


def _with_groups(pairs: list[list[ResolvedPair]], count: int, total: int, config: PruningConfig) -> list[list[int]]:
    """What each pair keeps when so many KV groups are left, and all FFNs lose the same share of the rest."""
    ffns = [pair for block in pairs for pair in block if pair.spec.kind == "ffn"]
    rest = _beside_groups(pairs, count, total, config)
    share = _level(rest, [_size(pair) for pair in ffns], [removed(pair) for pair in ffns])

    def left(pair: ResolvedPair) -> int:
        return count if pair.spec.kind == "groups" else _ffn_width(pair, share * _size(pair), config.multiple_of)

    return [[min(left(pair), pair.kept.numel()) for pair in block] for block in pairs]
