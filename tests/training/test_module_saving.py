"""CausalLMModule: its checkpoints load on any shapes, and it exports plain models."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens
from tiny_lightning import SCRATCH, Folder, loader, logits, sgd, steps, trained_names, trainer
from tiny_pruning import BOTH, calibration, pruned

from fasp_lightning import FASPPruner, load_pruned, save_pruned
from fasp_lightning.checkpoints.facts import facts_in
from fasp_lightning.checkpoints.publishing.record import mark_of
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.training.modeling.lora import LoRAConfig, merge_lora
from fasp_lightning.training.module import CausalLMModule


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3)])
def test_a_pruned_checkpoint_resumes_in_a_fresh_dense_module(
    lora: LoRAConfig | None, tiny_folder: Folder, tmp_path: Path
) -> None:
    def fresh() -> CausalLMModule:
        return CausalLMModule(str(tiny_folder()), lora=lora)

    half, whole, resumed = fresh(), fresh(), fresh()
    for module in (half, whole):
        FASPPruner(BOTH).prune(module.model, calibration())
    runner = trainer(tmp_path)
    runner.fit(half, loader())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2).fit(whole, loader())
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.model.fasp_plan == whole.model.fasp_plan
    assert trained_names(resumed) == trained_names(whole)
    expected = dict(whole.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.named_parameters())


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3, targets=("v_proj", "down_proj"))])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_load_from_checkpoint_rebuilds_the_pruned_module(
    name: str, lora: LoRAConfig | None, weights_only: bool, tiny_folder: Folder, tmp_path: Path
) -> None:
    if name == "gpt2" and lora:
        lora = LoRAConfig(rank=3, targets=("c_attn", "c_fc"))
    module = CausalLMModule(str(tiny_folder(name)), lora=lora, optimizer=sgd)
    FASPPruner(BOTH).prune(module.model, calibration())
    runner, checkpoint = trainer(tmp_path), tmp_path / "last.ckpt"
    runner.fit(module, loader())
    runner.save_checkpoint(checkpoint, weights_only=weights_only)
    loaded = CausalLMModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert torch.equal(logits(loaded), logits(module))
    assert loaded.model.fasp_plan == module.model.fasp_plan
    assert trained_names(loaded) == trained_names(module)


def test_validate_takes_a_checkpoint_of_other_shapes_in_both_directions(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    (dense,) = runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "dense.ckpt")
    FASPPruner(BOTH).prune(module.model, calibration())
    (cut,) = runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "cut.ckpt")
    for name, expected in (("dense", dense), ("cut", cut)):
        assert runner.validate(module, loader(), ckpt_path=tmp_path / f"{name}.ckpt", verbose=False) == [expected]


def test_a_pruned_folder_is_loaded_with_its_plan_and_trains(tmp_path: Path) -> None:
    model = pruned("llama", BOTH)
    save_pruned(model, tmp_path / "compact", form="compact")
    module = CausalLMModule(str(tmp_path / "compact"), optimizer=sgd)
    assert module.model.fasp_plan == model.fasp_plan
    losses = steps(module)
    assert all(map(math.isfinite, losses))
    trainer(tmp_path).fit(module, loader())
    assert module.model.fasp_plan == model.fasp_plan


def test_from_scratch_it_trains_prunes_and_loads(tmp_path: Path) -> None:
    module, runner = CausalLMModule(config=SCRATCH), trainer(tmp_path)
    FASPPruner(BOTH).prune(module.model, calibration())
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(logits(CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")), logits(module))


def test_hyperparameters_are_plain_data_without_optimizer_and_scheduler(tiny_folder: Folder) -> None:
    module = CausalLMModule(
        tiny_folder(),  # type: ignore[arg-type]
        lora=LoRAConfig(targets=("q_proj",)),
        optimizer=sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        dtype=torch.float32,  # type: ignore[arg-type]
    )
    hparams = dict(module.hparams)
    assert hparams["name_or_path"] == str(tiny_folder())
    assert hparams["dtype"] == "float32"
    assert hparams["lora"] == LoRAConfig(targets=("q_proj",)).to_dict()
    assert not {"optimizer", "lr_scheduler"} & set(hparams)


@pytest.mark.parametrize("cut", [False, True])
def test_it_travels_between_processes(cut: bool, tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3), gradient_checkpointing=True)
    if cut:
        FASPPruner(BOTH).prune(module.model, calibration())
    assert torch.equal(logits(pickle.loads(pickle.dumps(module))), logits(module))


def test_export_of_a_pruned_module_merges_its_lora_and_leaves_it_as_it_was(
    tiny_folder: Folder, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3), optimizer=sgd)
    FASPPruner(BOTH).prune(module.model, calibration())
    steps(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert module.export(tmp_path / "out", tiny_tokenizer, form="compact") == tmp_path / "out"
    assert module.model.training
    assert has_adapters(module.model)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert math.isfinite(steps(module, 1)[0])
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    module.load_state_dict(before)
    with torch.no_grad():
        found = load_pruned(tmp_path / "out")(input_ids=random_tokens()).logits
    torch.testing.assert_close(found, logits(module), atol=1e-5, rtol=1e-5)


def test_export_of_a_dense_module_loads_with_transformers(tiny_folder: Folder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3))
    steps(module)
    module.export(tmp_path / "out")
    merge_lora(module.model)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=random_tokens()).logits, logits(module), atol=1e-6, rtol=1e-6)


def test_export_refuses_a_folder_that_holds_something_else(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()))
    with pytest.raises(FileExistsError, match="must be empty"):
        module.export(tiny_folder())
    with pytest.raises(ValueError, match="'auto' or 'stock'"):
        module.export(tmp_path / "out", form="compact")
    assert not (tmp_path / "out").exists()


def test_merging_by_the_module_leaves_a_checkpoint_that_loads(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    module.attach_lora(LoRAConfig(rank=3))
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "attached.ckpt")
    module.merge_lora()
    runner.save_checkpoint(tmp_path / "merged.ckpt")
    assert has_adapters(CausalLMModule.load_from_checkpoint(tmp_path / "attached.ckpt"))
    assert torch.equal(logits(CausalLMModule.load_from_checkpoint(tmp_path / "merged.ckpt")), logits(module))


def test_what_was_measured_before_recovery_is_no_figure_of_the_recovered_model(tmp_path: Path) -> None:
    model = pruned("llama-gqa")
    figures = {"perplexity": 7.0, "seq_len": 12, "tokens": 22}
    text = {"name": "t", "domain": "other", "before": figures, "after": figures}
    model.fasp_report |= {"evaluation": [text], "weights": mark_of(model)}
    save_pruned(model, tmp_path / "p", verify=False)
    module = CausalLMModule(str(tmp_path / "p"), lora=LoRAConfig(rank=2))
    module.export(tmp_path / "untrained")
    trainer(tmp_path, max_steps=2).fit(module, loader())
    module.export(tmp_path / "trained")
    assert [facts_in(tmp_path / name).measured for name in ("p", "untrained", "trained")] == [True, True, False]
