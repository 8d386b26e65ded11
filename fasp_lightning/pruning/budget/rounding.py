"""What the units of a pair are rounded to, as kernels and formats like it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair

KERNEL_MULTIPLES, FINEST = (256, 128, 64, 32), 32
"""Numbers of columns that kernels and quantised formats work on at a time; an FFN width has at least ``FINEST`` steps
of the one that it is rounded to."""

ALIGNED = 8
"""Hidden units of an expert that go at a time: 16 bytes in 16 bits."""

FFNS = {"ffn", "experts"}
"""Kinds of pairs whose width is rounded to a multiple, that of each expert."""


def step_units(pair: ResolvedPair, config: PruningConfig) -> int:
    """Units of a pair that go at a time.

    One value dim of every head that is kept even, a multiple of FFN units, in each expert where there are some, or one
    whole expert of each group.

    Args:
        pair: The pair.
        config: ``head_balance`` and ``multiple_of`` are read.
    """
    if pair.spec.kind in FFNS:
        return pair.layout.groups * multiple_of(pair, config)
    return pair.layout.groups if config.head_balance == "even" or pair.layout.experts else 1


def multiple_of(pair: ResolvedPair, config: PruningConfig) -> int:
    """What the width of an FFN, or of each expert, is rounded to a multiple of.

    Experts have kernels that take no others: _grouped_mm (transformers, integrations/moe.py) wants strides of 16 bytes.
    """
    multiple, size = ffn_multiple(pair.layout.size, config), pair.layout.size
    return multiple if pair.spec.kind == "ffn" or size % ALIGNED else math.lcm(multiple, ALIGNED)


def ffn_multiple(width: int, config: PruningConfig) -> int:
    """What an FFN width is rounded to a multiple of.

    Kernels and quantised formats work on blocks of 32 to 256 columns: llama.cpp stores a row whose length does not
    divide by 32 (for K-quants: by 256) unquantised, Marlin wants 128. The largest of these that costs at most 1/32 of
    the width in rounding is taken.

    Args:
        width: The original FFN width.
        config: ``multiple_of`` is read.
    """
    if config.multiple_of != "auto":
        return config.multiple_of
    if width < KERNEL_MULTIPLES[-1] * FINEST:
        return KERNEL_MULTIPLES[-1] if width % KERNEL_MULTIPLES[-1] == 0 else 1
    return next(multiple for multiple in KERNEL_MULTIPLES if multiple * FINEST <= width)


def together(block: Sequence[ResolvedPair]) -> list[list[int]]:
    """Places of the pairs of a block whose units are decided together: FFNs and experts of one config field."""
    fields: dict[Any, list[int]] = {}
    for place, pair in enumerate(block):
        fields.setdefault(pair.spec.width_field if pair.spec.kind in FFNS else place, []).append(place)
    return sorted(fields.values(), key=max)


def ffn_widths(pairs: Sequence[ResolvedPair], wanted: float, config: PruningConfig) -> list[int]:
    """Units left where about ``wanted`` parameters are gone, to the nearest column, then to the nearest multiple.

    Args:
        pairs: FFNs and experts of one config field: their widths stay in the ratio that they had.
        wanted: Parameters.
        config: ``multiple_of`` is read.
    """
    narrowest = _narrowest(pairs)
    size, multiple = narrowest.layout.size, multiple_of(narrowest, config)
    left = size - round(max(wanted, 0.0) / sum(pair.layout.width // size * pair.unit_cost for pair in pairs))
    if left < size:
        left = max(multiple, round(left / multiple) * multiple)
    left = max(1, min(left, size))
    return [pair.layout.width // size * left for pair in pairs]


def fewest_units(pairs: Sequence[ResolvedPair], config: PruningConfig) -> list[int]:
    """Units that are left of such pairs in any case: one multiple.

    Args:
        pairs: As for :func:`ffn_widths`.
        config: ``multiple_of`` is read.

    Raises:
        FaspError: If ``multiple_of`` exceeds the width.
    """
    narrowest = _narrowest(pairs)
    size, multiple = narrowest.layout.size, multiple_of(narrowest, config)
    if multiple > size:
        raise FaspError(f"multiple_of must be at most the FFN width {size}, got {multiple}")
    return [pair.layout.width // size * multiple for pair in pairs]


def _narrowest(pairs: Sequence[ResolvedPair]) -> ResolvedPair:
    """The pair whose width the others are multiples of."""
    return min(pairs, key=lambda pair: (pair.layout.size, pair.spec.kind))  # experts before an FFN as wide as they
