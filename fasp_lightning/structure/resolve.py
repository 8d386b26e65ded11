"""Spec + model → modules, with every shape checked up front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasp_lightning.ops.slicing import expand, shrink
from fasp_lightning.structure.compact import GatherColumns, ScatterRows, inner, replace_module, set_features
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair

Kept = Mapping[str, tuple[PairLayout, Tensor]]
"""Consumer path → (original layout, units left), for the pairs of one block that were cut before."""


@dataclass
class ResolvedPair:
    """One pair of one block.

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
        """The consumer's linear module."""
        return inner(self.block.get_submodule(self.spec.consumer))

    @property
    def producers(self) -> list[nn.Linear]:
        """The producers' linear modules."""
        return [inner(self.block.get_submodule(path)) for path in self.spec.producers]

    @property
    def weight(self) -> Tensor:
        """(out, columns left) weight of the consumer."""
        weight = self.consumer.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def columns(self) -> int:
        """Number of consumer columns left."""
        return self.weight.shape[1]

    @property
    def column_cost(self) -> int:
        """Parameters that go with one unit: its consumer columns, and its producer rows with their bias entries."""
        cost = self.weight.shape[0] * self.layout.repeats
        unit = torch.zeros(1, dtype=torch.long)
        for index, producer in enumerate(self.producers):
            rows = self.layout.unit_rows(index, unit).numel()
            cost += rows * (_shape(producer, self.transposed)[1] + (getattr(producer, "bias", None) is not None))
        return cost

    def cut(self, kept: Tensor, *, wrap: bool = True) -> None:
        """Remove all units but ``kept`` on both sides, in place.

        Args:
            kept: Ascending units in original numbering, a subset of those left.
            wrap: Let the stock attention code go on seeing full widths. Without, the model cannot run until
                :meth:`wrap` was called; loaders that address parameters by path need that.
        """
        kept = kept.to("cpu")
        if torch.equal(kept, self.kept):
            return
        self._shrink_consumer(torch.searchsorted(self.layout.columns(self.kept), self.layout.columns(kept)))
        for index in range(len(self.spec.producers)):
            old, new = self.layout.rows(index, self.kept), self.layout.rows(index, kept)
            self._shrink_producer(index, torch.searchsorted(old, new))
        self.kept = kept
        if wrap:
            self.wrap()

    def wrap(self) -> None:
        """Put a cut value pair behind its run-time modules; an FFN, cut on both sides, needs none."""
        if self.spec.kind == "ffn":
            return
        consumer = self.consumer
        columns = self.layout.columns(self.kept).to(consumer.weight.device)
        replace_module(self.block, self.spec.consumer, GatherColumns(consumer, columns))
        for index, (path, producer) in enumerate(zip(self.spec.producers, self.producers, strict=True)):
            rows = self.layout.rows(index, self.kept).to(producer.weight.device)
            scatter = ScatterRows(producer, rows, self.layout.producer_rows[index])
            replace_module(self.block, path, scatter)

    def _shrink_consumer(self, positions: Tensor) -> None:
        linear = self.consumer
        shrink(linear.weight, positions, self._column_dim)
        set_features(linear, self.transposed)

    def _shrink_producer(self, index: int, positions: Tensor) -> None:
        linear = self.producers[index]
        shrink(linear.weight, positions, 1 - self._column_dim)
        if getattr(linear, "bias", None) is not None:
            shrink(linear.bias, positions, 0)
        set_features(linear, self.transposed)

    @property
    def _column_dim(self) -> int:
        return 0 if self.transposed else 1

    def zero_filled(self) -> dict[str, Tensor]:
        """The pair's tensors in their original shapes, zero where units are gone; keys are paths in the block."""
        columns = self.layout.columns(self.kept)
        width = self.layout.width * self.layout.repeats
        path = self.spec.consumer
        tensors = {f"{path}.weight": expand(self.consumer.weight.detach(), columns, self._column_dim, width)}
        for index, (path, linear) in enumerate(zip(self.spec.producers, self.producers, strict=True)):
            rows, width = self.layout.rows(index, self.kept), self.layout.producer_rows[index]
            tensors[f"{path}.weight"] = expand(linear.weight.detach(), rows, 1 - self._column_dim, width)
            if getattr(linear, "bias", None) is not None:
                tensors[f"{path}.bias"] = expand(linear.bias.detach(), rows, 0, width)
        return tensors


def find_blocks(model: nn.Module, spec: ArchitectureSpec) -> nn.ModuleList:
    """The decoder blocks.

    Raises:
        ValueError: If ``spec.layers`` is not the path of a ``ModuleList`` in this model.
    """
    try:
        blocks = model.get_submodule(spec.layers)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"layers must be the path of a ModuleList in {type(model).__name__}, got {spec.layers!r}")
    return blocks


def resolve(
    model: nn.Module, spec: ArchitectureSpec, cuts: Sequence[Kept] | None = None
) -> list[list[ResolvedPair]]:
    """Find the pairs of every block, and check their shapes against the model's config.

    Args:
        model: A causal LM, on any device, ``meta`` included.
        spec: Its row.
        cuts: What was cut before, one mapping a block.

    Returns:
        For each block its pairs, in the order of the forward pass.

    Raises:
        ValueError: If a path or shape does not fit; the message names the layer.
    """
    blocks = find_blocks(model, spec)
    heads = getattr(model.config, "num_attention_heads", None)
    resolved = []
    for index, block in enumerate(blocks):
        name = f"{spec.layers}.{index}"
        before = cuts[index] if cuts else {}
        resolved.append([_resolve_pair(block, name, pair, spec.transposed, heads, before) for pair in spec.pairs])
    return resolved


def _resolve_pair(
    block: nn.Module, name: str, pair: CoupledPair, transposed: bool, heads: int | None, before: Kept
) -> ResolvedPair:
    columns = _shape(_linear_at(block, name, pair.consumer), transposed)[1]
    rows = tuple(_shape(_linear_at(block, name, path), transposed)[0] for path in pair.producers)
    if pair.consumer in before:
        layout, kept = before[pair.consumer]
    else:
        layout = _fresh_layout(f"{name}.{pair.consumer}", pair, columns, rows, heads)
        kept = torch.arange(layout.width, device="cpu")
    resolved = ResolvedPair(block, name, pair, layout, kept, transposed)
    expected = (layout.columns(kept).numel(), *(layout.rows(i, kept).numel() for i in range(len(rows))))
    for path, found, wanted in zip((pair.consumer, *pair.producers), (columns, *rows), expected, strict=True):
        if found != wanted:
            raise ValueError(f"{name}.{path} must have a width of {wanted} to match {pair.consumer}, got {found}")
    return resolved


def _fresh_layout(
    name: str, pair: CoupledPair, columns: int, rows: tuple[int, ...], heads: int | None
) -> PairLayout:
    """Layout of a pair that was never cut; head counts follow from the shapes and the number of query heads."""
    if pair.kind == "ffn":
        parts = 2 if pair.fused else 1
        for path, found in zip(pair.producers, rows, strict=True):
            if found != parts * columns:
                raise ValueError(f"{path} must have {parts * columns} rows to feed {name}, got {found}")
        return PairLayout("ffn", columns, 1, 1, pair.fused, rows)
    if not isinstance(heads, int) or columns % heads:
        raise ValueError(f"{name}: num_attention_heads must divide its {columns} columns, got {heads}")
    size = columns // heads
    groups = rows[0] // size if pair.fused is None else (rows[0] // size - heads) // 2
    whole = size * (groups if pair.fused is None else heads + 2 * groups)
    if groups < 1 or heads % groups or rows[0] != whole:
        raise ValueError(
            f"{name}: {heads} query heads of size {size} must divide evenly among its KV heads, "
            f"got {groups} of them in {rows[0]} producer rows"
        )
    return PairLayout("value", groups * size, groups, heads // groups, pair.fused, rows)


def _linear_at(block: nn.Module, name: str, path: str) -> nn.Linear:
    try:
        linear = inner(block.get_submodule(path))
    except AttributeError:
        raise ValueError(f"{name} must have a module {path!r}; correct the row of this model_type") from None
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        kind = f"{type(linear).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise ValueError(f"{name}.{path} must be a linear layer with a floating-point weight, got {kind}")
    return linear


def _shape(linear: nn.Linear, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module."""
    outputs, inputs = linear.weight.shape[::-1] if transposed else linear.weight.shape
    return outputs, inputs
