"""One coupled pair of one block, as modules: what it weighs, and how it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fasp_lightning.ops.basis import Basis, turn, turned
from fasp_lightning.ops.slicing import Dim, expand, shrink
from fasp_lightning.structure.adapters import adapters_of, base_of, effective_weight
from fasp_lightning.structure.compact import (
    GatherColumns,
    ScatterRows,
    WidthHook,
    set_features,
    set_heads,
    set_widths,
)
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.ownership import require_unspread
from fasp_lightning.structure.spec import CoupledPair

T = TypeVar("T")


class Piece(NamedTuple):
    """One parameter of a pair, and where the pair's units are in it.

    Attributes:
        parameter: The parameter.
        dim: Its dimension that is cut; of experts' weights the two, experts and hidden units, that are cut together.
        producer: Index of the producer it belongs to; ``None`` for the consumer.
        key: Its path in the block, of a pair without adapters.
    """

    parameter: Tensor
    dim: Dim
    producer: int | None
    key: str


@dataclass
class ResolvedPair:
    """One pair of one block. Low-rank adapters on its layers are cut, and restored, along with them.

    Attributes:
        block: The decoder block.
        name: Path of the block, for messages.
        spec: The pair's row.
        layout: Original numbering.
        kept: (m,) units left, ascending, in original numbering.
        transposed: Weights are stored (in, out).
    """

    block: nn.Module
    name: str
    spec: CoupledPair
    layout: PairLayout
    kept: Tensor
    transposed: bool

    @property
    def consumer(self) -> nn.Linear:
        """The consumer's linear module, with its adapters."""
        return self._linear(self.spec.consumer)

    @property
    def producers(self) -> list[nn.Linear]:
        """The producers' linear modules, with their adapters."""
        return [self._linear(path) for path in self.spec.producers]

    def _linear(self, path: str) -> nn.Linear:
        """A ``Conv1D`` is typed as what it is used like."""
        return cast(nn.Linear, self.block.get_submodule(path))

    @property
    def linears(self) -> list[tuple[str, nn.Linear]]:
        """Path in the model, and module, of the consumer and each producer."""
        paths = (self.spec.consumer, *self.spec.producers)
        return [(f"{self.name}.{path}", self._linear(path)) for path in paths]

    @property
    def layer(self) -> str:
        """Path of the consumer in the model."""
        return f"{self.name}.{self.spec.consumer}"

    @property
    def outputs(self) -> int:
        """Output features of the consumer."""
        return shape_of(self.consumer, self.transposed)[0]

    @property
    def columns(self) -> int:
        """Number of consumer columns left."""
        return shape_of(self.consumer, self.transposed)[1]

    @property
    def factors(self) -> list[Tensor]:
        """What acts on the consumer's columns: its (out, columns) weight, and the (r, columns) A of each adapter."""
        weight = self.consumer.weight.detach()
        adapters = adapters_of(self.spec.consumer, self.consumer)
        return [weight.T if self.transposed else weight, *(adapter.first.weight.detach() for adapter in adapters)]

    def factors_in(self, bases: Sequence[Basis]) -> list[Tensor]:
        """The factors in float64, in another basis of each KV head's value dims; in the given one for none."""
        factors = [factor.double() for factor in self.factors]
        blocks = self.column_blocks([basis.inverse.T for basis in bases])
        return [turned(factor, blocks, 1) for factor in factors] if bases else factors

    def effective(self, factors: Sequence[Tensor]) -> Tensor:
        """The (out, m) weight that ``factors`` make together, on any m of the columns."""
        base, *firsts = factors
        return effective_weight(base, firsts, adapters_of(self.spec.consumer, self.consumer))

    @property
    def weight(self) -> Tensor:
        """(out, columns left) weight of the consumer, its adapters included."""
        return self.effective(self.factors)

    @torch.no_grad()
    def assign(self, factors: Sequence[Tensor], bias: Tensor | None = None) -> None:
        """Write restored factors, and a refitted bias, into the consumer, whose weight the cut has made anew."""
        for target, value in zip(self.factors, factors, strict=True):
            target.copy_(value)
        if bias is not None:  # a new tensor, so that the old one can come back
            self.consumer.bias.data = torch.empty_like(self.consumer.bias).copy_(bias)

    @property
    def unit_cost(self) -> int:
        """Parameters that go with one unit: its consumer columns, and its producer rows with their bias entries."""
        unit = torch.zeros(1, dtype=torch.long)
        cost = self.outputs * self.layout.columns(unit).numel()
        for index, producer in enumerate(self.producers):
            rows = self.layout.unit_rows(index, unit).numel()
            cost += rows * (shape_of(producer, self.transposed)[1] + (getattr(producer, "bias", None) is not None))
        return cost

    def pieces(self) -> Iterator[Piece]:
        """Every parameter that is cut with the pair."""
        path, column_dim = self.spec.consumer, 0 if self.transposed else 1
        yield Piece(self.consumer.weight, column_dim, None, f"{path}.weight")
        for adapter in adapters_of(path, self.consumer):
            yield Piece(adapter.first.weight, 1, None, "")
        for index, (path, linear) in enumerate(zip(self.spec.producers, self.producers, strict=True)):
            yield Piece(linear.weight, 1 - column_dim, index, f"{path}.weight")
            if getattr(linear, "bias", None) is not None:
                yield Piece(linear.bias, 0, index, f"{path}.bias")
            for adapter in adapters_of(path, linear):
                yield Piece(adapter.second.weight, 0, index, "")
                if adapter.second.bias is not None:
                    yield Piece(adapter.second.bias, 0, index, "")

    def positions(self, piece: Piece, kept: Tensor) -> Tensor:
        """Where the units ``kept`` are in the original dimension of a piece, ascending."""
        return self.layout.columns(kept) if piece.producer is None else self.layout.rows(piece.producer, kept)

    def slices(self, before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Dim, Tensor]]:
        """How each parameter changes from the units ``before`` to the units ``after``: (parameter, dim, index)."""
        for piece in self.pieces():
            old, new = self.positions(piece, before), self.positions(piece, after)
            if old.numel() > new.numel():
                yield piece.parameter, piece.dim, torch.searchsorted(old.reshape(-1), new)

    def turn(self, bases: Sequence[Basis]) -> None:
        """Change the basis of each KV head's value dims, in place: v ← A v, O ← O A⁻¹. What is computed stays.

        Afterwards the units left number the new dims.

        Args:
            bases: Of the dims left of each KV head.
        """
        for piece in self.pieces():
            left = self.positions(piece, self.kept)
            if piece.producer is None:
                blocks = self.column_blocks([basis.inverse.T for basis in bases])
                basis, own = (blocks, self.column_blocks([basis.forward for basis in bases])), left
            else:
                basis = [basis.forward for basis in bases], [basis.inverse.T for basis in bases]
                own = self.layout.unit_rows(piece.producer, self.kept)
            turn(piece.parameter, torch.searchsorted(left, own), cast(int, piece.dim), basis)

    def column_blocks(self, blocks: Sequence[T]) -> list[T]:
        """What belongs to the columns of each query head, in their order, of what belongs to each KV head."""
        return [block for block in blocks for _ in range(self.layout.repeats)]

    def cut(self, kept: Tensor) -> None:
        """Remove all units but ``kept`` on both sides, in place.

        Args:
            kept: Ascending units in original numbering, a subset of those left.
        """
        kept = kept.to("cpu")
        if torch.equal(kept, self.kept):
            return
        require_unspread(self.layer, (piece.parameter for piece in self.pieces()))
        for parameter, dim, index in list(self.slices(self.kept, kept)):  # those of experts are told by their shapes
            shrink(parameter, index, dim)
        self.kept = kept
        self._set_features()

    @torch.no_grad()
    def shut(self, kept: Tensor) -> None:
        """Set the consumer's columns of all units left but ``kept`` to zero, in place: what a cut computes, uncut.

        Args:
            kept: Ascending units in original numbering, a subset of those left.
        """
        gone = torch.isin(self.layout.columns(self.kept), self.layout.columns(kept), invert=True)
        weight = self.consumer.weight
        weight.index_fill_(0 if self.transposed else 1, gone.nonzero().squeeze(1).to(weight.device), 0)

    def widen(self) -> None:
        """Give the pair its original shapes again, in place, with zeros where units are gone."""
        require_unspread(self.layer, (piece.parameter for piece in self.pieces()))
        whole = torch.arange(self.layout.width, device="cpu")
        for piece in list(self.pieces()):
            piece.parameter.grad = None
            piece.parameter.data = self._expanded(piece, whole)
        self.kept = whole
        self._set_features()

    def zero_filled(self, units: Tensor) -> dict[str, Tensor]:
        """The pair's tensors in the shapes of ``units``, zero where they are gone; keys are paths in the block.

        Args:
            units: Ascending units in original numbering, those left among them.
        """
        return {piece.key: self._expanded(piece, units) for piece in self.pieces()}

    def _expanded(self, piece: Piece, units: Tensor) -> Tensor:
        left, wanted = self.positions(piece, self.kept), self.positions(piece, units)
        size = wanted.numel() if isinstance(piece.dim, int) else wanted.shape
        return expand(piece.parameter.detach(), torch.searchsorted(wanted.reshape(-1), left), piece.dim, size)

    def _set_features(self) -> None:
        linears = {self.spec.consumer: self.consumer} | dict(zip(self.spec.producers, self.producers, strict=True))
        for path, linear in linears.items():
            outputs, inputs = shape_of(linear, self.transposed)
            set_features(base_of(linear), inputs, outputs)
            for adapter in adapters_of(path, linear):
                set_features(linear, inputs, outputs)
                adapter.first.in_features, adapter.second.out_features = inputs, outputs
        self.set_heads()
        if self.spec.kind == "value":
            set_widths(self.block, self._width_hooks())

    def set_heads(self) -> None:
        """Let the attention module know its head counts, if KV groups are the units and the config may say others."""
        if self.spec.kind == "groups":
            attention = self.block.get_submodule(self.spec.consumer.rpartition(".")[0])
            set_heads(attention, self.kept.numel() * self.layout.repeats, self.kept.numel())

    def _width_hooks(self) -> dict[str, WidthHook | None]:
        """What lets stock attention code go on seeing full widths; other pairs are narrower on all sides."""
        paths = (self.spec.consumer, *self.spec.producers)
        if self.kept.numel() == self.layout.width:
            return dict.fromkeys(paths)
        rows = [self.layout.rows(index, self.kept) for index in range(len(self.spec.producers))]
        scatters = map(ScatterRows, rows, self.layout.producer_rows)
        return dict(zip(paths, (GatherColumns(self.layout.columns(self.kept)), *scatters), strict=True))


def shape_of(linear: nn.Linear, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module."""
    outputs, inputs = linear.weight.shape[::-1] if transposed else linear.weight.shape
    return outputs, inputs
