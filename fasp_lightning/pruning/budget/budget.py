"""The budget of a pruning: how many units every pair will keep, and what that adds up to."""

from __future__ import annotations

from dataclasses import dataclass

from fasp_lightning.structure.layout import Cuts

SHARED = "groups"
"""The kind of pair whose width never differs between blocks: the number of KV groups stands in the config once."""


@dataclass(frozen=True)
class PairWidth:
    """Width of one pair, in units.

    Those are hidden units of the FFN or of all experts, value dims over all KV heads, KV groups, or whole experts.

    Attributes:
        layer: Path of the consumer, from the causal LM.
        consumer: Path of the consumer in its block.
        kind: ``"ffn"``, ``"value"``, ``"groups"``, ``"experts"`` or ``"whole_experts"``.
        original: Units of the original model.
        before: Units before this pruning.
        after: Units after it.
        columns: Columns of the consumer, of one expert's, before this pruning: the size of its gram.
        cost: Parameters that go with one unit.
        head_size: Size of the attention heads, 0 for an FFN.
        parts: Experts among which the units are divided evenly.
        idle: Of experts, parameters that each token leaves out before this pruning: those of the ones that it is not
            sent to.
        sent: Of experts, how many each token is sent to.
    """

    layer: str
    consumer: str
    kind: str
    original: int
    before: int
    after: int
    columns: int
    cost: int
    head_size: int
    parts: int = 1
    idle: int = 0
    sent: int = 0

    @property
    def idle_after(self) -> int:
        """The same after it."""
        if self.kind == "whole_experts":
            return self.idle * (self.after - self.sent) // max(1, self.before - self.sent)
        return self.idle and self.idle - self.removed * (self.parts - self.sent) // self.parts

    @property
    def dims_left(self) -> int:
        """Hidden units or value dims after it, also where whole KV groups are cut."""
        return self.after * self.head_size if self.kind == "groups" else self.after

    @property
    def removed(self) -> int:
        """Parameters that this pruning removes."""
        return (self.before - self.after) * self.cost

    def cached(self, units: int) -> int:
        """Entries of one token in the KV cache when so many units are left."""
        if self.kind == "value":  # cut values are scattered to their full width, which is that of the keys
            return 2 * self.original
        return 2 * units * self.head_size


@dataclass(frozen=True)
class Budget:
    """Widths of a whole model and what they amount to.

    Attributes:
        pairs: One tuple a block.
        linear_parameters: P_all, the linear parameters in the blocks of the original model.
        original_parameters: All parameters of the original model; tied ones count once.
        parameters_before: All parameters before this pruning.
        parameters_after: All parameters after it.
        attention: ``"value_dims"``, ``"kv_groups"`` or ``"none"``, as decided.
        allocation: As asked. Where that is not ``"uniform"``, the widths of single blocks are not known before
            calibration: ``pairs`` are the uniform ones, the sum is exact.
    """

    pairs: tuple[tuple[PairWidth, ...], ...]
    linear_parameters: int
    original_parameters: int
    parameters_before: int
    parameters_after: int
    attention: str
    allocation: str = "uniform"

    def decided_later(self, kind: str) -> bool:
        """Whether the widths of a kind of pair are decided block by block, by what calibration says of them."""
        return self.allocation != "uniform" and kind != SHARED and self.changes

    @property
    def changes(self) -> bool:
        """Whether anything is to be cut: nothing is where all widths are rounded to what they are."""
        return self.parameters_after < self.parameters_before

    @property
    def cut(self) -> list[PairWidth]:
        """The pairs that lose something in this pruning."""
        return [width for block in self.pairs for width in block if width.after < width.before]

    @property
    def cuts(self) -> Cuts:
        """What is, or will be, cut since the original model."""
        widths = [width for block in self.pairs for width in block]
        kinds = frozenset(width.kind for width in widths if width.after < width.original)
        left = {(width.consumer, width.after) for width in widths if width.kind not in ("value", SHARED)}
        uneven = len(left) > len({consumer for consumer, _ in left})
        return Cuts(kinds, self.decided_later("ffn") or uneven)

    @property
    def sparsity_before(self) -> float:
        """Fraction of the original blocks' linear parameters that is gone before this pruning."""
        return (self.original_parameters - self.parameters_before) / self.linear_parameters

    @property
    def sparsity(self) -> float:
        """Fraction of the original blocks' linear parameters that is removed."""
        return (self.original_parameters - self.parameters_after) / self.linear_parameters

    @property
    def sparsity_total(self) -> float:
        """Fraction of all original parameters that is removed."""
        return 1 - self.parameters_after / self.original_parameters
