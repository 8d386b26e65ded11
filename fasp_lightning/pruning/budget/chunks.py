"""How many experts are measured at once, so that their grams find room."""

from __future__ import annotations

from fasp_lightning.ops.statistics import DOUBLE_LIMIT

GRAM_ROOM = 2**30
"""Bytes that the grams of experts take together, if one alone does not take more: they are gone through in chunks."""


def gram_bytes(columns: int, damping: float | str) -> int:
    """Bytes that the sums behind the statistics of one expert take.

    Args:
        columns: Its hidden units.
        damping: As in the settings; with "auto" there is a second gram, of the tokens held back.
    """
    return (12 if columns <= DOUBLE_LIMIT else 4) * (2 if damping == "auto" else 1) * columns**2


def experts_at_once(columns: int, damping: float | str, experts: int) -> int:
    """Experts whose statistics are in memory together.

    Args:
        columns: Hidden units of each.
        damping: As for :func:`gram_bytes`.
        experts: Their number.
    """
    return min(experts, max(1, GRAM_ROOM // gram_bytes(columns, damping)))
