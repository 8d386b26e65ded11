"""The sparsity that a speed-up needs; the clock counts operations, so that every figure is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import MIXTURES, TINY, random_tokens, tiny_model
from tiny_clock import Operations, counting
from tiny_pruning import basic

from fasp_lightning import FaspError, FASPPruner
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.latency import sample as sampling
from fasp_lightning.pruning.latency.sample import (
    PATTERN,
    Sample,
    _first_units,
    layer_kinds,
    make_samples,
    random_values,
    shapes_of,
)
from fasp_lightning.pruning.latency.serving import Serving
from fasp_lightning.pruning.latency.speedup import Speedup, measure_speedup, plan_speedup
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

SHORT = Serving(prompt=20, new=4, batch=2)


@pytest.fixture
def clock() -> Iterator[Operations]:
    with counting() as clock:
        yield clock


def planned(clock: Operations, name: str, factor: float, serving: Serving = SHORT, **options: Any) -> Any:
    config, attention = TINY[name].config(), TINY[name].attention[-1]
    return plan_speedup(config, factor, serving, basic(**options), attn_implementation=attention, clock=clock)


def measured(clock: Operations, name: str, sparsity: float, serving: Serving = SHORT, **options: Any) -> Speedup:
    """Of a model whose pairs have the widths that a pruning would give them."""
    dense, pruned = tiny_model(name), tiny_model(name)
    config = basic(sparsity, **options)
    pairs = resolve_pruned(pruned, whole=config.whole)
    for block, widths in zip(pairs, decide_budget(pruned, config, pairs).pairs, strict=True):
        for pair, width in zip(block, widths, strict=True):
            pair.cut(_first_units(pair, width.after))
    record_plan(pruned, pairs)
    return measure_speedup(dense, pruned, serving, clock)


def assert_predicted(clock: Operations, name: str, factor: float = 1.1, **options: Any) -> None:
    found = planned(clock, name, factor, **options)
    result = measured(clock, name, found.sparsity, **options)
    for phase in ("prefill", "decode"):
        assert found.predicted.before[phase] == pytest.approx(result.before[phase])
        assert found.predicted.after[phase] == pytest.approx(result.after[phase])
        assert result.of(phase) >= factor


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_predicted_operations_are_those_of_the_pruned_model(clock, name: str) -> None:
    assert_predicted(clock, name)


@pytest.mark.laws
@pytest.mark.parametrize("name", sorted(TINY))
def test_predicted_operations_are_those_of_the_pruned_model_of_any_family(clock, name: str) -> None:
    assert_predicted(clock, name)


@pytest.mark.laws
@pytest.mark.parametrize("attention", ["value_dims", "kv_groups"])
def test_predicted_operations_with_pruned_attention(clock, attention: str) -> None:
    assert_predicted(clock, "llama-gqa", attention=attention)


def test_a_phase_asked_for_alone_needs_less(clock) -> None:
    both, prefill = (planned(clock, "llama", 1.2, Serving(20, 4, 2, phase)) for phase in ("both", "prefill"))
    assert prefill.predicted.of("prefill") >= 1.2 > prefill.predicted.of("decode")
    assert both.predicted.of("decode") >= 1.2
    assert prefill.sparsity < both.sparsity


@pytest.mark.laws
def test_adaptive_allocation_is_timed_at_the_mean_width(clock) -> None:
    uniform, adaptive = (planned(clock, "llama", 1.1, allocation=name) for name in ("uniform", "adaptive"))
    assert adaptive == uniform


def test_speedup_that_no_sparsity_reaches_is_refused(clock) -> None:
    with pytest.raises(FaspError, match=r"speedup must be at most \d\.\d+, which prefill and decode reach here"):
        planned(clock, "llama", 50.0)


def test_prompt_beyond_learned_positions_is_refused() -> None:
    with pytest.raises(FaspError, match=r"sequences of serving\.prompt and serving\.new must have at most 64 tokens"):
        plan_speedup(TINY["opt"].config(), 1.1, Serving(prompt=60, new=5))


def test_pruned_model_is_refused() -> None:
    model = tiny_model("llama")
    FASPPruner(basic(0.2)).prune(model, random_tokens(4))
    with pytest.raises(FaspError, match="speedup counts from the dense model, got one that is pruned already"):
        plan_speedup(model.config, 1.1)


@pytest.fixture
def samples() -> list[Sample]:
    """Of gemma3 in two widths."""
    config = TINY["gemma3"].config()
    pairs = [decide_budget(shapes_of(config, list(layer_kinds(config))), basic(part)).pairs[0] for part in (0.2, 0.4)]
    return make_samples(config, pairs, torch.device("cpu"), torch.float32)


def test_samples_have_all_blocks_of_a_small_model_and_prefill_takes_one_of_each_kind(samples) -> None:
    layers = layer_kinds(TINY["gemma3"].config())
    for sample in samples:
        assert Counter(sample.kinds) == layers
        assert len(find_blocks(sample.model, spec_for(sample.model))) == len(sample.blocks) == sum(layers.values())
        sample.shorten()
        assert sample.kinds == list(layers)
        assert len(find_blocks(sample.model, spec_for(sample.model))) == len(sample.blocks) == len(layers)


def test_samples_of_a_large_model_have_blocks_beyond_caches(monkeypatch) -> None:
    config = TINY["llama"].config()
    config.num_hidden_layers = 50
    shapes = shapes_of(config, [None])
    widths = [decide_budget(shapes, basic(part)).pairs[0] for part in (0.1, 0.5)]
    monkeypatch.setattr(sampling, "BEYOND_CACHES", 200_000)
    for sample in make_samples(config, widths, torch.device("cpu"), torch.float32):
        sizes = [sum(4 * parameter.numel() for parameter in block.parameters()) for block in sample.blocks]
        assert sum(sizes) >= 200_000 > sum(sizes[1:])


def test_samples_lie_in_the_memory_of_the_largest(samples) -> None:
    places = [
        {parameter.data_ptr(): parameter.numel() * parameter.element_size() for parameter in sample.model.parameters()}
        for sample in samples
    ]
    for head in ("get_input_embeddings", "get_output_embeddings"):
        first, second = (getattr(sample.model, head)().weight.data_ptr() for sample in samples)
        assert first == second  # an address decides on how long a copy takes
    for place in places:
        ends = [start + size for start, size in sorted(place.items())]
        assert all(end <= start for end, start in zip(ends, sorted(place)[1:], strict=False))  # none within another
        assert all(start % 64 == min(place) % 64 for start in place)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_moe"])  # a dense first block, and one without attention
def test_blocks_with_other_pairs_than_the_first_are_refused(clock: Operations, name: str) -> None:
    config = MIXTURES[name].config()
    with pytest.raises(FaspError, match=r"speedup needs blocks that are alike, got a \w+ model whose block 1 has"):
        plan_speedup(config, 1.1, SHORT, basic(attention="value_dims"), clock=clock)


def test_weights_are_all_random() -> None:
    values = random_values(1_100_000, torch.device("cpu"), torch.float32)
    assert values.numel() > PATTERN
    assert values.count_nonzero() > 0.99 * values.numel()
    assert values.std().item() == pytest.approx(0.06 / 12**0.5, rel=0.01)
