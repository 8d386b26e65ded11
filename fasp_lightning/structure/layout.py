"""Which rows and columns belong to a unit of a pair: pure index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLayout:
    """Numbering of one pair, always in that of the original model.

    A *unit* is what is removed at a time: a hidden unit of the FFN, or a value dim of one KV head.

    Attributes:
        kind: ``"ffn"`` or ``"value"``.
        width: Number of units of the original pair.
        groups: KV heads for value pairs, 1 for an FFN. Any units of each can be left.
        repeats: Consumer columns a unit feeds: query heads per KV head, 1 for an FFN.
        fused: Layout of the producers, see :class:`~fasp_lightning.structure.spec.CoupledPair`.
        producer_rows: Rows of each original producer.
    """

    kind: str
    width: int
    groups: int
    repeats: int
    fused: str | None
    producer_rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """Units in a group: the head size for value pairs."""
        return self.width // self.groups

    def columns(self, units: Tensor) -> Tensor:
        """Ascending consumer columns that are fed by ``units``."""
        group, dim = units // self.size, units % self.size
        heads = group.unsqueeze(0) * self.repeats + torch.arange(self.repeats, device=units.device).unsqueeze(1)
        return (heads * self.size + dim).reshape(-1).sort().values

    def unit_rows(self, producer: int, units: Tensor) -> Tensor:
        """Rows of one producer that make ``units``."""
        rows = self.producer_rows[producer]
        if self.fused == "interleaved":  # (group, queries of the group + key + value, head size)
            group, dim = units // self.size, units % self.size
            return (group * (self.repeats + 2) + self.repeats + 1) * self.size + dim
        if self.fused == "concatenated" and self.kind == "value":  # q | k | v
            return rows - self.width + units
        parts = torch.arange(0, rows, self.width, device=units.device)  # gate | up, or one part
        return (parts.unsqueeze(1) + units).reshape(-1)

    def rows(self, producer: int, kept: Tensor) -> Tensor:
        """Ascending rows of one producer that are left when only the units ``kept`` are; queries and keys stay."""
        left = torch.ones(self.producer_rows[producer], dtype=torch.bool, device=kept.device)
        left[self.unit_rows(producer, torch.arange(self.width, device=kept.device))] = False
        left[self.unit_rows(producer, kept)] = True
        return left.nonzero().squeeze(1)
