"""The sparsity that a speed-up needs; the clock counts operations, so that every figure is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from tiny_pruning import basic
from torch.utils.flop_counter import FlopCounterMode

from fasp_lightning import FaspError
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.latency.sample import _first_units
from fasp_lightning.pruning.latency.serving import Serving
from fasp_lightning.pruning.latency.speedup import Speedup, measure_speedup, plan_speedup
from fasp_lightning.structure.plan import record_plan, resolve_pruned

SHORT = Serving(prompt=20, new=4, batch=2)


class Operations:
    """A clock that shows the floating-point operations so far."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    def mark(self) -> int:
        return self._counter.get_total_flops()

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)


def planned(name: str, factor: float, serving: Serving = SHORT, **options: Any) -> Any:
    config, counter = TINY[name].config(), FlopCounterMode(display=False)
    attention = TINY[name].attention[-1]
    with counter:
        return plan_speedup(
            config, factor, serving, basic(**options), attn_implementation=attention, clock=Operations(counter)
        )


def measured(name: str, sparsity: float, serving: Serving = SHORT, **options: Any) -> Speedup:
    """Of a model whose pairs have the widths that a pruning would give them."""
    dense, pruned = tiny_model(name), tiny_model(name)
    config = basic(sparsity, **options)
    pairs = resolve_pruned(pruned, kv_groups=config.attention == "kv_groups")
    for block, widths in zip(pairs, decide_budget(pruned, config, pairs).pairs, strict=True):
        for pair, width in zip(block, widths, strict=True):
            pair.cut(_first_units(pair, width.after))
    record_plan(pruned, pairs)
    counter = FlopCounterMode(display=False)
    with counter:
        return measure_speedup(dense, pruned, serving, Operations(counter))


@pytest.mark.parametrize("name", TINY)
def test_predicted_operations_are_those_of_the_pruned_model(name: str) -> None:
    found = planned(name, 1.1)
    result = measured(name, found.sparsity)
    for phase in ("prefill", "decode"):
        assert found.predicted.before[phase] == pytest.approx(result.before[phase])
        assert found.predicted.after[phase] == pytest.approx(result.after[phase])
