"""Speed-ups in real time, on a model that is large enough to time: ``pytest -m seconds``, on a machine that is idle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fasp_lightning import PruningConfig, Serving, plan_speedup
from fasp_lightning.pruning.budget.widths import budget_towards
from fasp_lightning.pruning.latency.sample import random_model, shapes_of
from fasp_lightning.pruning.latency.speedup import measure_speedup

CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=4096,
)


@pytest.mark.seconds
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_speedup_is_within_a_tenth_of_the_measured(dtype: torch.dtype, phase: Any) -> None:
    serving = Serving(prompt=512, new=64, phase=phase)
    found = plan_speedup(CONFIG, 1.3, serving, dtype=dtype)
    dense, pruned = (of_sparsity(sparsity, dtype) for sparsity in (0.0, found.sparsity))
    measured = measure_speedup(dense, pruned, serving)
    assert found.predicted.of(phase) == pytest.approx(measured.of(phase), rel=0.1)


def of_sparsity(sparsity: float, dtype: torch.dtype) -> Any:
    kinds: list[None] = [None] * CONFIG.num_hidden_layers
    widths = budget_towards(shapes_of(CONFIG, kinds), PruningConfig(sparsity)).pairs
    return random_model(CONFIG, kinds, widths, torch.device("cpu"), dtype)
