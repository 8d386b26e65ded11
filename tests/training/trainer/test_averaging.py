"""Averaged weights follow the cut: the average starts again from the pruned weights, and goes on from there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from runs import UserModule, loader, trainer
from tiny import FFN, HIDDEN, VOCAB, tiny_model
from tiny_pruning import BOTH, basic, pruned
from torch import Tensor

from fasp_lightning import load_pruned, save_pruned
from fasp_lightning.structure.compact import width_hooks
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.modeling.lora import LoRAConfig
from fasp_lightning.training.module import CausalLMModule

pytestmark = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")

EVENTS = [{"step": 2, "sparsity": 0.1}, {"step": 5, "sparsity": 0.2}]
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
AVERAGES = {"ema": partial(EMAWeightAveraging, decay=0.9), "mean": WeightAveraging}
State = dict[str, Tensor]


def fasp(**options: Any) -> FASPPruning:
    """Cuts FFN units and value dims, twice."""
    config = basic(attention="value_dims")
    return FASPPruning(EVENTS, config, calibration_sequences=8, validation_batches=1, **options)


def ordered(order: str, *callbacks: L.Callback) -> list[L.Callback]:
    return list(callbacks) if order == "pruning first" else list(reversed(callbacks))


def state(module: Any) -> State:
    """Parameters by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_equal(found: State, expected: State, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=tolerance)


class Oracle(L.Callback):
    """Averages by itself: the weights after each step since the last event, that of the event not counted.

    Notes, for each validation, what it saw and what the average was.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.average: State = {}
        self.count = 0
        self.validations: list[tuple[State, State]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = state(pl_module)
        if self.average and any(self.average[name].shape != value.shape for name, value in weights.items()):
            self.count = 0
        share = 1.0 if self.count == 0 else 0.1 if self.kind == "ema" else 1 / (self.count + 1)
        self.count += 1
        self.average = {
            name: value if share == 1 else torch.lerp(self.average[name], value, share)
            for name, value in weights.items()
        }

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.average:
            self.validations.append((state(pl_module), self.average))


@pytest.mark.parametrize("order", ["pruning first", "averaging first"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_validation_and_the_end_see_the_average_since_the_last_event(kind: str, order: str, tmp_path: Path) -> None:
    module, oracle = UserModule(tiny_model("llama").train()), Oracle(kind)
    callbacks = ordered(order, fasp(), AVERAGES[kind]())
    # in between there are steps in which model and average differ; on step 5 validation comes right before the event
    trainer(tmp_path, oracle, *callbacks, max_steps=8, val_check_interval=1).fit(module, loader(), loader(2))
    assert len(oracle.validations) == 8
    for seen, average in oracle.validations:
        assert_equal(seen, average, 1e-6)
    assert_equal(state(module), oracle.average, 1e-6)
    assert module.lm.model.layers[0].mlp.down_proj.weight.shape[1] < FFN


@pytest.mark.parametrize("kind", AVERAGES)
def test_positions_of_kept_units_are_not_averaged(kind: str, tmp_path: Path) -> None:
    """A mean of equal integers may be rounded down."""
    module = UserModule(tiny_model("llama").train())
    average = EMAWeightAveraging(decay=0.997) if kind == "ema" else WeightAveraging()
    callback = FASPPruning([{"step": 0, "sparsity": 0.2}], basic(attention="value_dims"), validation_batches=0)
    trainer(tmp_path, callback, average, max_steps=20).fit(module, loader())
    cut = module.lm.fasp_plan.blocks[0]["self_attn.o_proj"]
    assert [hook.positions.tolist() for _, hook in width_hooks(module.lm.model.layers[0])] == [list(cut.kept)] * 2


@pytest.mark.parametrize("order", ["pruning first", "averaging first"])
def test_adapters_of_the_callback_are_averaged_and_merged(order: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, oracle = UserModule(tiny_model("llama").train()), Oracle("ema")
    dense = state(module)
    pruning = fasp(recovery="lora", lora=LoRAConfig(rank=2), export_to=str(tmp_path / "out"))
    callbacks = ordered(order, pruning, AVERAGES["ema"]())
    trainer(tmp_path, oracle, *callbacks, max_steps=8, val_check_interval=1).fit(module, loader(), loader(2))
    for seen, average in oracle.validations:
        assert_equal(seen, average, 1e-6)
    merged = state(module)
    assert merged.keys() == dense.keys()
    assert_equal({f"lm.{name}": value for name, value in state(load_pruned(tmp_path / "out")).items()}, merged)


def causal_lm(seed: int = 0) -> CausalLMModule:
    return CausalLMModule(config=CONFIG, optimizer=partial(torch.optim.AdamW, lr=1e-2), seed=seed)


def run(tmp_path: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, seed: int = 0) -> Any:
    """(module, trainer) of two epochs of four steps, with checkpoints at their ends in ``tmp_path``."""
    torch.manual_seed(seed)
    module = causal_lm(seed)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
    made = trainer(tmp_path, *callbacks, saver, **options)
    made.fit(module, loader(8), loader(2), ckpt_path=ckpt_path, weights_only=True)
    return module, made


@pytest.mark.parametrize("order", ["pruning first", "averaging first"])
@pytest.mark.parametrize("recovery", ["none", "lora"])
def test_resumed_run_ends_with_the_same_average(recovery: str, order: str, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        return ordered(order, fasp(recovery=recovery, lora=LoRAConfig(rank=2)), AVERAGES["ema"]())

    whole, _ = run(tmp_path, *callbacks())
    resumed, _ = run(tmp_path / "resumed", *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt", seed=1)
    assert_equal(state(resumed), state(whole))


def test_checkpoint_holds_the_average_for_whoever_loads_it(tmp_path: Path) -> None:
    oracle = Oracle("ema")
    _, made = run(tmp_path, fasp(), AVERAGES["ema"](), oracle)
    path = tmp_path / "epoch=1.ckpt"
    assert_equal(state(CausalLMModule.load_from_checkpoint(path)), oracle.average, 1e-6)
    fresh = causal_lm(seed=1)
    found = trainer(tmp_path).validate(fresh, loader(2), ckpt_path=path, verbose=False, weights_only=True)[0]
    assert found["val_loss"] == pytest.approx(made.callback_metrics["val_loss"].item())


@pytest.mark.parametrize("averaged", [True, False])
def test_averaging_may_begin_or_end_at_a_resume(averaged: bool, tmp_path: Path) -> None:
    """A checkpoint of a pruned model written with, or without, an average is resumed the other way round."""
    with_average, without = (lambda: [fasp(), AVERAGES["ema"]()]), (lambda: [fasp()])
    first, then = (with_average, without) if averaged else (without, with_average)
    run(tmp_path, *first())
    path = tmp_path / "epoch=0.ckpt"
    module, _ = run(tmp_path / "resumed", *then(), ckpt_path=path, seed=1)
    assert module.model.model.layers[0].mlp.down_proj.weight.shape[1] == module.model.config.intermediate_size < FFN


def test_positions_are_not_averaged_in_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    save_pruned(pruned("llama", BOTH), tmp_path / "pruned", form="compact")
    module = CausalLMModule(str(tmp_path / "pruned"))
    cut = module.model.fasp_plan.blocks[0]["self_attn.o_proj"]
    trainer(tmp_path, EMAWeightAveraging(decay=0.997), max_steps=20).fit(module, loader())
    (_, hook), *_ = width_hooks(module.model)
    assert hook.positions.tolist() == list(cut.kept)
