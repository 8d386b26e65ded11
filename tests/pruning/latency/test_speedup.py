"""The sparsity that a speed-up needs; the clock counts operations, so that every figure is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from tiny_pruning import basic
from torch.nn.modules.module import register_module_forward_hook

from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.latency.sample import _first_units
from fasp_lightning.pruning.latency.serving import Serving
from fasp_lightning.pruning.latency.speedup import Speedup, measure_speedup, plan_speedup
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.resolve import is_linear

SHORT = Serving(prompt=20, new=4, batch=2)


class Operations:
    """A clock that goes on by the operations of linear and embedding layers, and a little with every other module."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        return self.now

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        matrix = is_linear(module) and isinstance(output, torch.Tensor)
        self.now += module.weight.numel() * (output.numel() // output.shape[-1]) if matrix else 7


@pytest.fixture
def clock() -> Iterator[Operations]:
    clock = Operations()
    handle = register_module_forward_hook(clock)
    yield clock
    handle.remove()


def planned(clock: Operations, name: str, factor: float, serving: Serving = SHORT, **options: Any) -> Any:
    config, attention = TINY[name].config(), TINY[name].attention[-1]
    return plan_speedup(config, factor, serving, basic(**options), attn_implementation=attention, clock=clock)


def measured(clock: Operations, name: str, sparsity: float, serving: Serving = SHORT, **options: Any) -> Speedup:
    """Of a model whose pairs have the widths that a pruning would give them."""
    dense, pruned = tiny_model(name), tiny_model(name)
    config = basic(sparsity, **options)
    pairs = resolve_pruned(pruned, kv_groups=config.attention == "kv_groups")
    for block, widths in zip(pairs, decide_budget(pruned, config, pairs).pairs, strict=True):
        for pair, width in zip(block, widths, strict=True):
            pair.cut(_first_units(pair, width.after))
    record_plan(pruned, pairs)
    return measure_speedup(dense, pruned, serving, clock)


@pytest.mark.parametrize("name", TINY)
def test_predicted_operations_are_those_of_the_pruned_model(clock, name: str) -> None:
    found = planned(clock, name, 1.1)
    result = measured(clock, name, found.sparsity)
    for phase in ("prefill", "decode"):
        assert found.predicted.before[phase] == pytest.approx(result.before[phase])
        assert found.predicted.after[phase] == pytest.approx(result.after[phase])
