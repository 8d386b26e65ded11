"""What is foretold of sizes, cost and memory is what pruned models and prunings have."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic
from torch import nn
from transformers import DynamicCache

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.budget.footprint import PeakMemory, footprints, peak_memory_estimate
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.modes import frozen, requiring_gradients
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters

CONFIG = basic(0.25, attention="value_dims")


@pytest.mark.parametrize("family", TINY)
def test_sizes_and_flops_are_those_of_the_pruned_model(tiny: nn.Module) -> None:
    before, after = footprints(tiny, decide_budget(tiny, CONFIG), 4)
    head = tiny.get_output_embeddings().weight.numel()
    for foretold in (before, after):
        assert foretold.parameters == tiny.num_parameters()
        assert foretold.weight_bytes == sum(p.numel() * p.element_size() for p in tiny.parameters())
        assert foretold.flops_per_token == 2 * (linear_parameters(tiny, spec_for(tiny)) + head)
        if foretold is before:
            FASPPruner(CONFIG).prune(tiny, [random_tokens(16)])


@pytest.mark.parametrize("family", ["opt", "llama", "llama-gqa", "gemma", "phi3", "gpt2", "gpt_neox"])
def test_kv_cache_is_that_of_the_model_before_and_after(tiny: nn.Module) -> None:
    before, after = footprints(tiny, decide_budget(tiny, CONFIG), 4)
    for foretold in (before, after):
        cache = DynamicCache()
        tiny(random_tokens(1, 12), past_key_values=cache, use_cache=True)
        entries = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        assert foretold.kv_bytes_per_token == sum(entry.numel() * 4 for entry in entries) // 12
        if foretold is before:
            FASPPruner(CONFIG).prune(tiny, [random_tokens(16)])


def test_shapes_are_enough() -> None:
    with torch.device("meta"):
        meta = type(tiny_model("llama"))(TINY["llama"].config())
    assert footprints(meta, decide_budget(meta, CONFIG), 4) == footprints(
        tiny_model("llama"), decide_budget(tiny_model("llama"), CONFIG), 4
    )


class Gauge:
    """Bytes of the calibration set's tensors that are alive at once, at their peak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        put = TensorStore.put
        monkeypatch.setattr(TensorStore, "put", lambda store, tensor: self.watch(put(store, tensor.clone())))

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.free, size)
        return tensor

    def free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("attention", ["none", "value_dims"])
@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "gemma2", "gpt_neox"])
def test_memory_of_the_calibration_set(tiny: nn.Module, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = basic(0.25, attention=attention)
    options = {"evaluated_tokens": 0, "bytes_per_value": 4, "verify": False}
    estimate = peak_memory_estimate(tiny, decide_budget(tiny, config), config, tokens=16 * 12, **options)
    gauge = Gauge(monkeypatch)
    FASPPruner(config).prune(tiny, [random_tokens(1, seed=seed) for seed in range(16)])
    assert 0.75 * estimate.calibration <= gauge.peak <= 1.1 * estimate.calibration


@pytest.mark.parametrize("family", ["opt", "llama", "llama-gqa", "bloom", "phi3", "gpt2", "falcon"])
def test_memory_of_the_loss_sensitivity(tiny: nn.Module, family: str) -> None:
    """What autograd keeps beside the weights, in tensors that are alive together."""
    config, kept = PruningConfig(0.2, attention="none", score="fisher"), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in tiny.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    options = {"evaluated_tokens": 0, "bytes_per_value": 4, "verify": False}
    estimate = peak_memory_estimate(tiny, decide_budget(tiny, config), config, tokens=2 * 60, **options)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with frozen(tiny), requiring_gradients(tiny.get_input_embeddings()), saved:
        keep(tiny(random_tokens(2, 60), use_cache=False).logits)
    found = sum(size for address, (size, _) in kept.items() if address not in weights)
    assert 0.4 * estimate.sensitivity <= found <= estimate.sensitivity


def test_settings_take_the_memory_that_they_need() -> None:
    model = tiny_model("llama")
    widths, options = decide_budget(model, CONFIG), {"tokens": 10**4, "evaluated_tokens": 0, "bytes_per_value": 4}

    def estimate(**changes: Any) -> PeakMemory:
        return peak_memory_estimate(model, widths, replace(CONFIG, **changes), verify=False, **options)

    plain = estimate()
    assert plain.sensitivity == 0
    assert estimate(damping="auto").solve > plain.solve > estimate(restoration="none", damping="auto").solve
    for changes in ({"score": "fisher"}, {"allocation": "adaptive"}):
        assert estimate(**changes).sensitivity > estimate(**changes, sensitivity_tokens=100).sensitivity > 0


def test_later_parts_do_not_add_up() -> None:
    model = tiny_model("llama")
    options = {"tokens": 100, "bytes_per_value": 4}
    widths = decide_budget(model, CONFIG)
    base = peak_memory_estimate(model, widths, CONFIG, evaluated_tokens=0, verify=False, **options)
    more = peak_memory_estimate(model, widths, CONFIG, evaluated_tokens=1, verify=True, **options)
    assert more.reload > 0 < more.logits
    assert more.total == base.total
