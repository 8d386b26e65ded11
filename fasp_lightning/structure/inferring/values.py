"""The values of a block's attention, found by which rows of a layer reach which columns of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.inferring.tracing import Trace, has_traced, is_sparse, is_transposed, linears_of
from fasp_lightning.structure.inferring.twin import HIDDEN, block_list, built_with
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.resolve import resolve
from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair


def value_pair(model: Any, path: str, traces: Sequence[dict[str, Trace]]) -> CoupledPair | None:
    """The value pair whose rows reach what its layout says, in every block that has it."""
    for pair in dict.fromkeys(pair for traced in traces for pair in _value_pairs(traced)):
        having = [traced for traced in traces if has_traced(traced, pair)]
        if all(_fits(model, path, pair, traced) for traced in having):
            groups = _groups(pair, having[0])
            return groups if groups is not None and _builds_groups(model, path, groups) else pair
    return None


def _value_pairs(traced: dict[str, Trace]) -> Iterator[CoupledPair]:
    for producer, trace in traced.items():
        for consumer in trace.crossing:
            if is_sparse(trace.reached[consumer]) and "." in consumer and _mixes(traced, consumer):
                for fused in (None, "concatenated", "interleaved"):
                    yield CoupledPair(consumer, (producer,), "value", fused)


def _fits(model: Any, path: str, pair: CoupledPair, traced: dict[str, Trace]) -> bool:
    layout = _layout(model, path, pair, traced)
    if layout is None:
        return False
    trace = traced[pair.producers[0]]
    reached = trace.reached.get(pair.consumer)
    if reached is None or trace.rows != layout.producer_rows[0] or pair.consumer not in trace.crossing:
        return False
    expected = torch.zeros_like(reached)
    rows = layout.unit_rows(0, torch.arange(layout.width))
    for unit, row in enumerate(rows.tolist()):
        expected[row, layout.columns(torch.tensor([unit]))] = True
    found = reached[rows]
    return bool((found == expected[rows]).all())


def _layout(model: Any, path: str, pair: CoupledPair, traced: dict[str, Trace]) -> PairLayout | None:
    """The layout of a pair in the blocks that were traced, told by the shapes there; none if it fits none."""
    for block in block_list(model)[1]:
        linears = linears_of(block)
        if set(traced) <= set(linears) and traced[pair.producers[0]].reached:
            transposed = is_transposed(linears[pair.consumer])
            part = _One(model.config, path, block)
            try:
                return resolve(part, ArchitectureSpec(path, (pair,), transposed=transposed))[0][0].layout
            except FaspError:
                return None
    return None


class _One(nn.Module):
    """A model of one block."""

    def __init__(self, config: Any, path: str, block: nn.Module) -> None:
        super().__init__()
        self.config = config
        inner: nn.Module = nn.ModuleList([block])
        *parents, last = path.split(".")
        for name in reversed([*parents, last][1:]):
            outer = nn.Module()
            outer.add_module(name, inner)
            inner = outer
        self.add_module((*parents, last)[0], inner)


def _groups(pair: CoupledPair, traced: dict[str, Trace]) -> CoupledPair | None:
    """The pair with the paths of queries and keys, where each head's rows reach that head, or that group, alone."""
    if pair.fused:
        return replace(pair, groups=pair.producers)
    value = traced[pair.producers[0]].reached[pair.consumer]
    queries, keys = [], []
    for path, trace in traced.items():
        reached = trace.reached.get(pair.consumer)
        if path in pair.producers or reached is None or not is_sparse(reached):
            continue
        if pair.consumer in trace.crossing and trace.rows == value.shape[0]:
            keys.append(path)
        elif pair.consumer not in trace.crossing and trace.rows == value.shape[1]:
            queries.append(path)
    if len(queries) != 1 or len(keys) != 1:
        return None
    return replace(pair, groups=(queries[0], keys[0], pair.producers[0]))


def _builds_groups(model: Any, path: str, pair: CoupledPair) -> bool:
    """Whether stock code takes head counts and a head size from the config, and builds half of the groups by them."""
    spec = ArchitectureSpec(path, (pair,))
    try:
        layouts = {one.layout for block in resolve(model, spec, whole=("groups",)) for one in block}
    except FaspError:
        return False
    if len(layouts) > 1:
        return False
    layout = layouts.pop()
    fields = {"num_attention_heads": layout.repeats, "num_key_value_heads": 1, "head_dim": layout.head_size}
    built = built_with(model, fields)
    if built is None:
        return False
    shapes = {tuple(p.shape) for name, p in built.named_parameters() if name.endswith(f"{pair.consumer}.weight")}
    return shapes == {(HIDDEN, layout.repeats * layout.head_size)}


def _mixes(traced: dict[str, Trace], consumer: str) -> bool:
    """Whether some row reaches several neighbouring columns, which those of queries do: all of their head."""
    for trace in traced.values():
        reached = trace.reached.get(consumer)
        if reached is not None and is_sparse(reached) and (reached[:, 1:] & reached[:, :-1]).any():
            return True
    return False
