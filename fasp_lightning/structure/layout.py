"""Which rows and columns belong to a unit of a pair: pure index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLayout:
    """Numbering of one pair, always in that of the original model.

    A *unit* is what is removed at a time: a hidden unit of the FFN, a value dim of one KV head, or a KV group, that
    is, a whole KV head with its query heads.

    Attributes:
        kind: ``"ffn"``, ``"value"``, ``"groups"``, ``"experts"`` or ``"whole_experts"``.
        width: Number of units of the original pair.
        groups: Among how many the units are divided: KV heads that have value dims, experts that have hidden units, or
            groups of whole experts; 1 for other pairs.
        repeats: Query heads per KV head, 1 for an FFN.
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

    @property
    def experts(self) -> int:
        """Number of experts; 0 for other pairs."""
        return {"experts": self.groups, "whole_experts": self.width}.get(self.kind, 0)

    @property
    def expert_size(self) -> int:
        """Hidden units of one expert."""
        return self.producer_rows[0] // self.experts // (2 if self.fused else 1)

    @property
    def head_size(self) -> int:
        """Size of the attention heads; 0 for an FFN, which has none."""
        if self.kind == "groups":  # the producers are all queries, keys and values
            return sum(self.producer_rows) // (self.width * (self.repeats + 2))
        return self.size if self.kind == "value" else 0

    def columns(self, units: Tensor) -> Tensor:
        """Ascending consumer columns that are fed by ``units``."""
        if self.kind == "groups":
            return _spans(units, self.repeats * self.head_size)
        if self.kind == "whole_experts":
            return _spans(units, self.expert_size)
        group, dim = units // self.size, units % self.size
        heads = group.unsqueeze(0) * self.repeats + torch.arange(self.repeats, device=units.device).unsqueeze(1)
        return (heads * self.size + dim).reshape(-1).sort().values

    def units_of(self, columns: Tensor) -> Tensor:
        """Inverse of :meth:`columns`: the unit that feeds each column."""
        if self.kind == "groups":
            return columns // (self.repeats * self.head_size)
        if self.kind == "whole_experts":
            return columns // self.expert_size
        return columns // self.size // self.repeats * self.size + columns % self.size

    def unit_scores(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Score of each unit left: the sum over the columns it feeds.

        Args:
            scores: (columns left,) column scores.
            kept: (m,) ascending units left.

        Returns:
            (m,) scores, on the CPU: sums there do not depend on the order in which threads come.
        """
        owners = torch.searchsorted(kept, self.units_of(self.columns(kept)))
        return torch.zeros(kept.numel(), dtype=scores.dtype).index_add(0, owners, scores.cpu())

    def dims(self, kept: Tensor) -> list[int]:
        """Value dims left of each KV head."""
        return torch.bincount(kept // self.size, minlength=self.groups).tolist()

    def unit_rows(self, producer: int, units: Tensor) -> Tensor:
        """Rows of one producer that make ``units``."""
        rows = self.producer_rows[producer]
        if self.kind == "whole_experts":
            return _spans(units, rows // self.width)
        if self.kind == "experts":
            return self._expert_rows(rows // self.width, units)
        if self.kind == "groups":
            return torch.cat([start + _spans(units, size) for start, size in self._spans_of(rows)])
        if self.fused == "interleaved":  # (group, queries of the group + key + value, head size)
            group, dim = units // self.size, units % self.size
            return (group * (self.repeats + 2) + self.repeats + 1) * self.size + dim
        if self.fused == "concatenated" and self.kind == "value":  # q | k | v
            return rows - self.width + units
        parts = torch.arange(0, rows, self.width, device=units.device)  # gate | up, or one part
        return (parts.unsqueeze(1) + units).reshape(-1)

    def rows(self, producer: int, kept: Tensor) -> Tensor:
        """Ascending rows of one producer that are left when only the units ``kept`` are; rows of no unit stay."""
        left = torch.ones(self.producer_rows[producer], dtype=torch.bool, device=kept.device)
        left[self.unit_rows(producer, torch.arange(self.width, device=kept.device))] = False
        left[self.unit_rows(producer, kept)] = True
        return left.nonzero().squeeze(1)

    def _expert_rows(self, parts: int, units: Tensor) -> Tensor:
        """Rows of gate and up that make hidden units of experts, each of which has its own behind one another."""
        if self.fused == "interleaved":
            return _spans(units, parts)
        start = units // self.size * parts * self.size + units % self.size
        return (torch.arange(parts, device=units.device).unsqueeze(1) * self.size + start).reshape(-1)

    def _spans_of(self, rows: int) -> list[tuple[int, int]]:
        """Where a producer's rows of KV groups start, and how many each group has there, one entry a part."""
        if self.fused != "concatenated":
            return [(0, rows // self.width)]
        size, queries = self.head_size, self.width * self.repeats * self.head_size
        return [(0, self.repeats * size), (queries, size), (queries + self.width * size, size)]


def _spans(units: Tensor, size: int) -> Tensor:
    """Positions of units that have ``size`` neighbouring ones each."""
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).reshape(-1)


Widths = dict[tuple[str, PairLayout], dict[int, int]]
"""Consumer path and layout → the units of each block that has such a pair, by its index."""


@dataclass(frozen=True)
class Cuts:
    """Which kinds of pairs are cut, and whether blocks agree.

    Attributes:
        kinds: Kinds of the pairs that are cut in some block.
        uneven: Blocks have different FFN widths, or different numbers of KV groups or experts, which is what a pruning
            that failed half-way leaves.
    """

    kinds: frozenset[str] = frozenset()
    uneven: bool = False

    def __or__(self, other: Cuts) -> Cuts:
        return Cuts(self.kinds | other.kinds, self.uneven or other.uneven)
