"""Which columns stay."""

from __future__ import annotations

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError


def select_columns(scores: Tensor, keep: int, groups: int = 1) -> Tensor:
    """Indices of the best columns, the same number in each group.

    The columns are split in ``groups`` consecutive groups of equal size (for value dims: one group a KV head).
    Ties go to the lower index, so the outcome depends on the scores alone.

    Args:
        scores: (n,) column scores.
        keep: Number of columns to keep in each group.
        groups: Number of groups; must divide n.

    Returns:
        (groups · keep,) ascending indices into the n columns.

    Raises:
        FaspError: If ``groups`` does not divide n, or ``keep`` is not between 1 and the group's size.
    """
    columns = scores.numel()
    if groups < 1 or columns % groups:
        raise FaspError(f"groups must divide the number of columns {columns}, got {groups}")
    size = columns // groups
    if not 1 <= keep <= size:
        raise FaspError(f"keep must be in [1, {size}], got {keep}")
    order = scores.reshape(groups, size).sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :keep].sort(dim=1).values
    offsets = torch.arange(groups, device=scores.device).unsqueeze(1) * size
    return (kept + offsets).reshape(-1)


def complement(kept: Tensor, columns: int) -> Tensor:
    """Ascending indices in range(columns) that are not in ``kept``."""
    removed = torch.ones(columns, dtype=torch.bool, device=kept.device)
    removed[kept] = False
    return removed.nonzero().squeeze(1)
