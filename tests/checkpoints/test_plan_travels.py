"""The plan travels in the config: whatever saves, loads or copies a pruned model keeps what was cut of it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic, calibration
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from fasp_lightning import FaspError, FASPPruner, PruningPlan, apply_plan, load_model, load_pruned, save_pruned
from fasp_lightning.structure.plan import conform, plan_of

CUTS = {
    "value": ("opt", "value_dims", {}),
    "value-fused": ("gpt2", "value_dims", {}),
    "ffn": ("llama", "none", {}),
    "ffn-fixed": ("bloom", "none", {}),
    "uneven": ("llama", "none", {"allocation": "adaptive", "score": "fisher"}),
    "groups": ("llama", "kv_groups", {}),
}
"""Family, attention and further settings; each leaves other shapes."""


def prune(model: nn.Module, sparsity: float = 0.2, attention: str = "none", **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few calibration tokens
        FASPPruner(basic(sparsity, attention=attention, **options)).prune(model, calibration())
    return model


def pruned(cut: str, sparsity: float = 0.2) -> nn.Module:
    name, attention, options = CUTS[cut]
    return prune(tiny_model(name), sparsity, attention, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(), use_cache=False).logits


def stock(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def assert_loads(path: Path, model: nn.Module) -> None:
    loaded = load_pruned(path, attn_implementation=model.config._attn_implementation)
    assert plan_of(loaded) == plan_of(model)
    assert loaded.num_parameters() == model.num_parameters()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize("attention", ["value_dims", "none"])
def test_plain_save_pretrained_loads_with_its_plan(family: str, attention: str, tmp_path: Path) -> None:
    model = prune(tiny_model(family), attention=attention)
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, model)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
def test_every_cut_survives_save_pretrained(cut: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(cut)
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict()), **options)  # as Trainer._save has it
    assert_loads(tmp_path, model)
    assert load_model(tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.parametrize("cut", CUTS)
def test_what_stock_loads_and_saves_again_keeps_its_plan(cut: str, tmp_path: Path) -> None:
    model = pruned(cut)
    save_pruned(model, tmp_path / "p")
    stock(tmp_path / "p").save_pretrained(tmp_path / "again")
    assert_loads(tmp_path / "again", model)
    assert save_pruned(stock(tmp_path / "again"), tmp_path / "q").form == save_pruned(model, tmp_path / "r").form
    assert_loads(tmp_path / "q", model)


@pytest.mark.parametrize("cut", ["value", "value-fused", "ffn-fixed", "uneven"])
def test_stock_loaders_refuse_what_they_cannot_build(cut: str, tmp_path: Path) -> None:
    pruned(cut).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        stock(tmp_path)
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(FaspError, match=r"units as the plan in config\.fasp has it, got weights for"):
        prune(drawn, 0.3)


@pytest.mark.parametrize("cut", CUTS)
def test_sparsity_counts_from_the_original_of_what_stock_loaded(cut: str, tmp_path: Path) -> None:
    _, attention, options = CUTS[cut]
    model = pruned(cut)
    save_pruned(model, tmp_path)
    loaded = stock(tmp_path)
    first = plan_of(model)
    further = 0.5 if cut == "groups" else 0.3
    prune(loaded, further, attention, **options)
    prune(model, further, attention, **options)
    assert loaded.num_parameters() == model.num_parameters()
    for before, after in zip(first.blocks, plan_of(loaded).blocks, strict=True):
        assert all(set(after[path].kept) <= set(pair.kept) for path, pair in before.items())


def test_units_that_hold_values_are_not_taken_for_zeros(tmp_path: Path) -> None:
    save_pruned(pruned("value"), tmp_path)
    model = stock(tmp_path)
    model.model.decoder.layers[1].self_attn.out_proj.weight.data.fill_(1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FaspError, match=r"layers\.1\.self_attn\.out_proj must have \d+ of 32 .*got weights for 32"):
        prune(model, 0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.config.fasp = None
    assert prune(model, 0.3).num_parameters() < pruned("value").num_parameters()


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    pruned("ffn").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    more = pruned("ffn", 0.1).config.fasp
    (tmp_path / "config.json").write_text(json.dumps({**config, "fasp": more}))
    with pytest.raises(FaspError, match=r"must have a width of \d+ as the plan in config\.fasp has it, got \d+"):
        load_pruned(tmp_path)
    shapes = {"pairs": [{**config["fasp"]["pairs"][0], "producer_rows": [48]}]}
    for changes in (shapes, {"pairs": [{**config["fasp"]["pairs"][0], "consumer": "input_layernorm"}]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "fasp": config["fasp"] | changes}))
        with pytest.raises(FaspError, match=r"plan of .*model\.layers\.0"):
            load_pruned(tmp_path)


def test_a_model_that_lost_a_block_is_refused_by_name() -> None:
    model = pruned("ffn")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    with pytest.raises(FaspError, match=r"plan of 1 blocks as the model has, got one of 2; .*config\.fasp to None"):
        prune(model, 0.3)


def test_pruning_one_of_two_models_of_a_config_does_not_mark_the_other() -> None:
    config = TINY["llama"].config()
    first, second = (type(tiny_model("llama"))(config) for _ in range(2))
    prune(first)
    assert plan_of(second) is None
    assert second.config.intermediate_size == 48
    assert {id(part.config) for part in first.modules() if hasattr(part, "config")} == {id(first.config)}
    prune(second, 0.3)
    assert plan_of(first).widths != plan_of(second).widths


def test_a_new_model_of_a_pruned_config_takes_its_shapes_only_where_asked() -> None:
    model = pruned("value")
    with pytest.raises(FaspError, match=r"built from a pruned one's config.*apply_plan"):
        prune(AutoModelForCausalLM.from_config(model.config), 0.3)
    fresh = AutoModelForCausalLM.from_config(model.config)
    apply_plan(fresh, plan_of(fresh))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh.eval()), logits(model))
    whole = conform(AutoModelForCausalLM.from_config(model.config), None)
    whole.load_state_dict(tiny_model("opt").state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_pruned_further_from_the_original(copied: Any, tmp_path: Path) -> None:
    model = pruned("value")
    other = copied(model)
    assert plan_of(other) == plan_of(model)
    other.save_pretrained(tmp_path)
    assert_loads(tmp_path, model)


def test_the_config_stays_one_that_transformers_read_and_write(family: str, tmp_path: Path) -> None:
    config = prune(tiny_model(family), attention="value_dims").config
    assert type(config).from_dict(config.to_dict()).fasp == config.fasp
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).fasp == copy.deepcopy(config).fasp == config.fasp
    assert PruningPlan.from_dict(json.loads(config.to_json_string())["fasp"]).model_type == config.model_type


def test_a_trainers_checkpoints_load_and_resume(tmp_path: Path) -> None:
    ids = random_tokens(4, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options: dict[str, Any] = {"output_dir": tmp_path, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    options |= {"per_device_train_batch_size": 2, "save_steps": 1, "max_steps": 2, "seed": 1}
    model = pruned("value")
    Trainer(model, TrainingArguments(**options), train_dataset=data).train()
    assert_loads(tmp_path / "checkpoint-2", model.eval())
    resumed = load_pruned(tmp_path / "checkpoint-1")
    trainer = Trainer(resumed, TrainingArguments(**options), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed.eval()), logits(model))
    trainer.save_model(tmp_path / "out")
    assert_loads(tmp_path / "out", model)
    with pytest.raises(FileExistsError, match="holds no pruned model"):
        save_pruned(model, tmp_path, overwrite=True)  # the Trainer's folder, with its checkpoints
