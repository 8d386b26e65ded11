"""Which share of its parameters each pair loses, so that all of them together lose what was asked for."""

from __future__ import annotations

import math

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.pair import ResolvedPair


def removed(pair: ResolvedPair) -> int:
    """Parameters of a pair that are gone."""
    return (pair.layout.width - pair.kept.numel()) * pair.unit_cost


def missing(pair: ResolvedPair) -> int:
    """Parameters that a pair's weights lack: fewer than are gone where its units are as another pruning will leave."""
    columns = pair.layout.columns(torch.zeros(1, dtype=torch.long)).numel()
    return (pair.layout.width - pair.columns // columns) * pair.unit_cost


def size_of(pair: ResolvedPair) -> int:
    """Parameters of the original pair that go with its units, n_p · c_p."""
    return pair.layout.width * pair.unit_cost


def share_to_remove(
    pairs: list[list[ResolvedPair]], least: list[list[int | None]], sparsity: float, total: int, whole: str
) -> float:
    """r = R / Σ n_p c_p: the fraction that each pair to be pruned loses; below 1, since each keeps something.

    Args:
        pairs: The pairs of each block.
        least: Fewest units that each of them can be left with; ``None`` for those that are not pruned.
        sparsity: Fraction of ``total`` to remove, R = sparsity · total.
        total: P_all, the linear parameters in the blocks of the original model.
        whole: What is not pruned at all, for the message.

    Raises:
        FaspError: If the sparsity cannot be reached; the message gives the highest one that can.
    """
    flat = [
        (pair, fewest) for block, row in zip(pairs, least, strict=True) for pair, fewest in zip(block, row, strict=True)
    ]
    removable = sum(
        removed(pair) if fewest is None else (pair.layout.width - fewest) * pair.unit_cost for pair, fewest in flat
    )
    if sparsity * total > removable:
        highest = math.floor(removable / total * 1e4) / 1e4
        raise FaspError(f"sparsity must be at most {highest} with {whole} kept, got {sparsity}")
    sizes = [
        sum(size_of(pair) for pair, fewest in zip(block, row, strict=True) if fewest is not None)
        for block, row in zip(pairs, least, strict=True)
    ]
    return level(sparsity * total, sizes, [sum(map(removed, block)) for block in pairs])


def level(wanted: float, sizes: list[int], gone: list[int]) -> float:
    """The share r with Σ max(r · size, gone) = wanted: parts that have lost more before leave less to the others.

    Args:
        wanted: Parameters that are to be gone from all parts together.
        sizes: Parameters of each part; 0 for one that is not pruned.
        gone: Parameters that each part has lost already.
    """
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
