"""Every entry says of what is no causal LM itself what to pass instead, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Fabric, LightningModule
from peft import LoraConfig, get_peft_model
from tiny import random_tokens, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fasp_lightning import FASPPruner, apply_plan, perplexity, save_pruned
from fasp_lightning.errors import FaspError
from fasp_lightning.structure.plan import PruningPlan

TOKENS = [random_tokens()]
PLAN = PruningPlan("llama", ({}, {}))
ENTRIES: dict[str, Callable[[Any, Path], Any]] = {
    "prune": lambda model, _: FASPPruner().prune(model, TOKENS),
    "prepare": lambda model, _: FASPPruner().prepare(model, TOKENS),
    "save_pruned": lambda model, path: save_pruned(model, path / "p"),
    "apply_plan": lambda model, _: apply_plan(model, PLAN),
    "perplexity": lambda model, _: perplexity(model, TOKENS),
}


class Holder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model("llama")


def config() -> Any:
    return tiny_model("llama").config


GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "DataParallel": (lambda: nn.DataParallel(tiny_model("llama")), r"model\.module"),
    "LightningModule": (Holder, r"model\.net"),
    "headless": (lambda: AutoModel.from_config(config()), "got LlamaModel.*AutoModelForCausalLM"),
    "sequences": (lambda: AutoModelForSequenceClassification.from_config(config()), "AutoModelForCausalLM"),
    "tokens": (lambda: AutoModelForTokenClassification.from_config(config()), "AutoModelForCausalLM"),
    "state dict": (lambda: tiny_model("llama").state_dict(), "got OrderedDict"),
    "path": (lambda: "models/llama", "got str; load it with"),
    "nothing": (lambda: None, "got NoneType"),
}
AROUND: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(tiny_model("llama")), r"model\._orig_mod"),
    "Fabric": (lambda: Fabric(accelerator="cpu").setup(tiny_model("llama")), r"model\._forward_module"),
    "peft": (lambda: get_peft_model(tiny_model("llama"), LoraConfig()), r"merge_and_unload\(\).*get_base_model\(\)"),
    "peft on gpt2, whose blocks it hands on": (  # by their path
        lambda: get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
        r"merge_and_unload\(\).*get_base_model\(\)",
    ),
}
"""What hands on all that the model in it has."""


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_no_causal_lm_is_refused_by_every_entry_alike(given: str, tmp_path: Path) -> None:
    make, advice = GIVEN[given]
    model = make()
    for enter in ENTRIES.values():
        with pytest.raises(FaspError, match=rf"model must .*{advice}"):
            enter(model, tmp_path)


@pytest.mark.parametrize("given", AROUND)
def test_what_hands_on_its_model_is_not_pruned(given: str, tmp_path: Path) -> None:
    make, advice = AROUND[given]
    model = make()
    for name in ENTRIES.keys() - {"perplexity"}:
        with pytest.raises(FaspError, match=rf"model must be the causal LM itself.*{advice}"):
            ENTRIES[name](model, tmp_path)


def test_a_perplexity_is_that_of_what_hands_on_its_model() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig())
    assert perplexity(model, TOKENS) == pytest.approx(perplexity(tiny_model("llama"), TOKENS), rel=1e-4)
