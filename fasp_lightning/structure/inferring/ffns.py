"""The FFN of a block, found by which rows of a layer reach which columns of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasp_lightning.structure.inferring.tracing import Trace, has_traced, is_sparse
from fasp_lightning.structure.spec import CoupledPair

ENOUGH = 0.5
"""Share of a layer's rows that must be seen to reach something: single ones may be dead behind a ReLU."""


def ffn_pair(traces: Sequence[dict[str, Trace]]) -> CoupledPair | None:
    """The pair with the most columns whose producers reach them one by one in every block that has it."""
    found = {}
    for traced in traces:
        for consumer in traced:
            pair = _ffn_into(traced, consumer)
            if pair is not None:
                found[consumer] = pair
    fitting = {
        consumer: pair
        for consumer, pair in found.items()
        if all(_ffn_into(traced, consumer) == pair for traced in traces if has_traced(traced, pair))
    }
    width = {consumer: max(_columns(traced, consumer) for traced in traces) for consumer in fitting}
    return fitting[max(width, key=lambda name: width[name])] if fitting else None


def _ffn_into(traced: dict[str, Trace], consumer: str) -> CoupledPair | None:
    producers, fused = [], set()
    for path, trace in traced.items():
        if consumer not in trace.reached:
            continue
        reached = trace.reached[consumer]
        if consumer in trace.crossing and is_sparse(reached):
            return None  # values, or what is mixed over tokens otherwise
        if consumer not in trace.crossing and _one_by_one(reached):
            producers.append(path)
            fused.add(trace.rows != reached.shape[1])
    if not producers or len(fused) > 1 or (True in fused and len(producers) > 1):
        return None
    return CoupledPair(consumer, tuple(producers), "ffn", "concatenated" if True in fused else None)


def _one_by_one(reached: Tensor) -> bool:
    """Whether row r reaches column r, or column r modulo their number where there are twice as many rows."""
    rows, columns = reached.shape
    if rows not in (columns, 2 * columns):
        return False
    own = torch.arange(rows) % columns
    hit = reached[torch.arange(rows), own]
    return int(reached.sum()) == int(hit.sum()) >= ENOUGH * rows


def _columns(traced: dict[str, Trace], consumer: str) -> int:
    return max((t.reached[consumer].shape[1] for t in traced.values() if consumer in t.reached), default=0)
