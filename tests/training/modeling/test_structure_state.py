"""Whatever shapes a module has: a checkpoint gives it the ones it was saved with."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from runs import FFN_ONLY, UserModule, half, loader, trainer
from tiny import random_tokens, tiny_model
from tiny_lightning import lora_parameters
from tiny_pruning import basic
from torch import nn
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, save_pruned
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora
from fasp_lightning.training.modeling.structure_state import KEY, carry_structure


class Saving(L.Callback):
    """Saves a checkpoint after the fifth step."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.folder / "step5.ckpt")


BATCHES = [random_tokens(2, 40, seed=seed) for seed in range(3)]
BOTH = basic(0.2, attention="value_dims")


def module(family: str = "llama", sparsity: float = 0.0, lora: bool = False, seed: int = 0) -> UserModule:
    """A user's module that carries its structure."""
    found = UserModule(tiny_model(family, seed=seed))
    if sparsity:
        FASPPruner(basic(sparsity, attention="value_dims")).prune(found.lm, BATCHES)
    if lora:
        attach_lora(found.lm, LoRAConfig(rank=2))
        with torch.no_grad():
            for parameter in lora_parameters(found.lm):
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    carry_structure(found)
    return found


def assert_loads(source: UserModule, target: UserModule) -> None:
    identities = {id(one) for one in target.parameters()}
    target.load_state_dict(source.state_dict())
    assert source.state_dict().keys() == target.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])
    if not has_adapters(source.lm):
        assert {id(one) for one in target.parameters()} == identities
    logits = [one.lm(input_ids=BATCHES[0], use_cache=False).logits for one in (source, target)]
    assert torch.equal(*logits)


@pytest.mark.sampled
@pytest.mark.parametrize("before", [0.0, 0.1, 0.3], ids=["dense", "less", "more"])
@pytest.mark.parametrize("saved", [0.0, 0.2], ids=["dense", "pruned"])
def test_shapes_come_from_the_state(saved: float, before: float, family: str) -> None:
    assert_loads(module(family, saved), module(family, before, seed=1))


@pytest.mark.parametrize("before", [False, True], ids=["plain", "adapted"])
def test_adapters_come_from_the_state(before: bool) -> None:
    assert_loads(module(sparsity=0.2, lora=True), module(lora=before, seed=1))


def test_state_without_adapters_loads_under_adapters() -> None:
    source, target = module(sparsity=0.2), module(lora=True, seed=1)
    target.load_state_dict(source.state_dict())
    down = "model.layers.0.mlp.down_proj"
    weight = target.lm.get_submodule(f"{down}.base_layer").weight
    assert torch.equal(weight, source.lm.get_submodule(down).weight)
    assert target.lm.get_submodule(f"{down}.lora_A.default").weight.shape == (2, weight.shape[1])


def test_dense_module_has_a_plain_state() -> None:
    assert module().state_dict().keys() == UserModule(tiny_model("llama")).state_dict().keys()


def test_a_zero_filled_model_that_stock_code_loaded_has_the_shapes_of_its_plan(tmp_path: Any) -> None:
    source = module(sparsity=0.2)
    save_pruned(source.lm, tmp_path, form="zero_filled", verify=False)
    loaded = UserModule(AutoModelForCausalLM.from_pretrained(tmp_path))
    carry_structure(loaded)
    assert {name: one.shape for name, one in loaded.state_dict().items() if name != KEY} == {
        name: one.shape for name, one in source.state_dict().items() if name != KEY
    }
    assert_loads(loaded, module(seed=1))


def test_pruned_state_does_not_load_where_nothing_reads_it() -> None:
    with pytest.raises(RuntimeError, match=KEY):
        UserModule(tiny_model("llama")).load_state_dict(module(sparsity=0.2).state_dict())


@pytest.mark.parametrize("recovery", ["none", "lora"])
def test_checkpoint_of_a_users_run_validates_and_goes_on(recovery: str, tmp_path: Any) -> None:
    def fresh() -> UserModule:
        return UserModule(tiny_model("llama", seed=5).train())

    torch.manual_seed(0)
    run = trainer(tmp_path, half(2, recovery=recovery), Saving(tmp_path), max_steps=6)
    run.fit(fresh(), loader(), loader(4))
    path = tmp_path / "step5.ckpt"
    state = torch.load(path, weights_only=True)
    again = trainer(tmp_path, half(2, recovery=recovery))
    other = fresh()
    again.validate(other, loader(4), ckpt_path=path, verbose=False)
    assert other.lm.get_submodule("model.layers.0.mlp.down_proj").in_features == 24
    assert has_adapters(other.lm) == (recovery == "lora")
    for name, value in other.state_dict().items():
        assert torch.equal(value, state["state_dict"][name])
    more = trainer(tmp_path, half(2, recovery=recovery), max_steps=8)
    more.fit(fresh(), loader(), loader(4), ckpt_path=path)
    assert more.global_step == 8


def test_state_of_other_parts_alone_leaves_the_shapes() -> None:
    target = module(sparsity=0.2)
    target.head = nn.Linear(2, 2)
    shapes = {name: value.shape for name, value in target.named_parameters()}
    target.load_state_dict({"head.weight": torch.zeros(2, 2)}, strict=False)
    assert {name: value.shape for name, value in target.named_parameters()} == shapes
    assert (target.head.weight == 0).all()


@pytest.mark.parametrize(
    "entries",
    [[(6, 0.2)], [(1, 0.05), (2, 0.1), (6, 0.2)], [(2, 0.1), (6, 0.2)]],
    ids=["done ones taken out", "one put before", "one appended"],
)
def test_run_resumed_with_another_schedule_goes_on_with_what_is_left_of_it(entries: Any, tmp_path: Any) -> None:
    def callback(events: Any) -> FASPPruning:
        data = [{"step": step, "sparsity": sparsity} for step, sparsity in events]
        return FASPPruning(data, FFN_ONLY, calibration_sequences=8, validation_batches=0)

    run = trainer(tmp_path, callback([(2, 0.1)]), max_steps=4)
    run.fit(UserModule(tiny_model("llama").train()), loader())
    run.save_checkpoint(tmp_path / "short.ckpt")
    longer = callback(entries)
    more = trainer(tmp_path, longer, max_steps=8)
    more.fit(UserModule(tiny_model("llama").train()), loader(), ckpt_path=tmp_path / "short.ckpt")
    assert [(record.step, round(record.sparsity, 1)) for record in longer.records] == [(2, 0.1), (6, 0.2)]


def test_weights_alone_are_enough_for_the_shapes(tmp_path: Any) -> None:
    run = trainer(tmp_path, half(2), max_steps=4)
    source = UserModule(tiny_model("llama").train())
    run.fit(source, loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    target = UserModule(tiny_model("llama", seed=3).train())
    again = trainer(tmp_path, half(2), max_steps=3)
    again.validate(target, loader(4), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert target.lm.config.intermediate_size == 24
    again.fit(target, loader(), loader(4))  # the event is done: the weights say so
    assert target.lm.config.intermediate_size == 24
