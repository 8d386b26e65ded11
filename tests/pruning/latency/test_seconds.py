"""Speed-ups in real time, on a model that is large enough to time: ``pytest -m seconds``, on a machine that is idle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fasp_lightning import PruningConfig, Serving, plan_speedup
from fasp_lightning.pruning.budget.widths import budget_towards
from fasp_lightning.pruning.latency.sample import cut_shapes, lay, shapes_of
from fasp_lightning.pruning.latency.serving import PHASES
from fasp_lightning.pruning.latency.speedup import measure_speedup

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"small": (576, 1536, 30, 9, 3), "wide": (2048, 8192, 8, 32, 8)}
VOCABULARIES = {"small": 49152, "wide": 32000}
CONFIGS = {
    name: LlamaConfig(
        **dict(zip(SHAPE, shape, strict=True)),
        vocab_size=VOCABULARIES[name],
        max_position_embeddings=4096,
        tie_word_embeddings=name == "small",
    )
    for name, shape in SHAPES.items()
}


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_predicted_speedup_is_within_a_tenth_of_the_measured(name: str, dtype: torch.dtype) -> None:
    serving = Serving(prompt=512, new=64)
    found = plan_speedup(CONFIGS[name], 1.2, serving, dtype=dtype)
    dense, pruned = (of_sparsity(CONFIGS[name], sparsity, dtype) for sparsity in (0.0, found.sparsity))
    measured = measure_speedup(dense, pruned, serving)
    figures = {phase: (found.predicted.of(phase), measured.of(phase)) for phase in PHASES}
    assert all(predicted == pytest.approx(got, rel=0.1) for predicted, got in figures.values()), figures


def of_sparsity(config: LlamaConfig, sparsity: float, dtype: torch.dtype) -> Any:
    kinds: list[None] = [None] * config.num_hidden_layers
    widths = budget_towards(shapes_of(config, kinds), PruningConfig(sparsity)).pairs
    model = cut_shapes(config, kinds, widths, dtype, {})
    lay([model], torch.device("cpu"), dtype)
    return model
