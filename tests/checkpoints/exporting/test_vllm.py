"""Folders for vLLM: stock ones as they are, a width for each block as DeciLM; vLLM itself where it is installed."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, tiny_model
from tiny_pruning import FFN, INGREDIENTS, basic, pruned

from fasp_lightning import FaspError, LoRAConfig, export_vllm, load_pruned
from fasp_lightning.checkpoints.exporting.vllm import answering, vllm_process

UNEVEN = basic(attention="none", allocation="adaptive", score="fisher")
needs_vllm = pytest.mark.skipif(
    not os.environ.get(answering.PYTHON), reason=f"{answering.PYTHON} names no python that has vLLM"
)


def config_class(folder):
    """The class that the folder brings, as trust_remote_code takes it."""
    spec = importlib.util.spec_from_file_location("decilm_of_test", folder / "configuration_decilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeciLMConfig


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2"])
def test_blocks_keep_their_widths_as_decilm(name, tmp_path):
    model = pruned(name, UNEVEN)
    widths = [block.mlp.down_proj.weight.shape[1] for block in model.model.layers]
    assert len(set(widths)) > 1
    exported = export_vllm(model, tmp_path / "served", check=False)
    assert exported.architecture == "DeciLMForCausalLM"
    config = config_class(tmp_path / "served").from_pretrained(tmp_path / "served")
    assert [block.ffn.intermediate_size for block in config.block_configs] == widths
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")  # vLLM would prefer it
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    assert {block.attention.n_heads_in_group for block in config.block_configs} == {group}
    assert getattr(config, "qkv_bias", False) is (name == "qwen2")
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    assert [tensors[f"model.layers.{at}.mlp.up_proj.weight"].shape[0] for at in range(len(widths))] == widths


def test_value_dims_are_zero_filled_beside_widths_of_blocks(tmp_path):
    model = pruned("llama", INGREDIENTS["adaptive"])
    export_vllm(model, tmp_path / "served", check=False)
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.v_proj.weight"].shape == (32, 32)
    assert not tensors["model.layers.0.self_attn.v_proj.weight"].any(1).all()


def test_a_dense_model_is_overwritten_if_asked(tmp_path):
    for overwrite in (False, True):
        exported = export_vllm(tiny_model("llama"), tmp_path / "served", check=False, overwrite=overwrite)
    assert exported.architecture == "LlamaForCausalLM"
    with pytest.raises(FaspError, match="no plan"):
        load_pruned(tmp_path / "served")


def test_fewer_kv_groups_stay_fewer_beside_widths_of_blocks(tmp_path):
    model = pruned("llama-gqa", basic(0.4, attention="kv_groups", allocation="adaptive", score="fisher"))
    exported = export_vllm(model, tmp_path / "served", check=False)
    assert exported.architecture == "DeciLMForCausalLM"
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    for at in range(config["num_hidden_layers"]):
        rows = tensors[f"model.layers.{at}.self_attn.k_proj.weight"].shape[0]
        assert rows == config["num_key_value_heads"] * config["head_dim"]


@pytest.mark.parametrize(("name", "config"), [("llama-gqa", FFN), ("gemma", UNEVEN)])
def test_other_models_are_served_as_stock_folders(name, config, tmp_path):
    exported = export_vllm(pruned(name, config), tmp_path / "served", check=False)
    assert exported.architecture == json.loads((tmp_path / "served" / "config.json").read_text())["architectures"][0]
    assert load_pruned(tmp_path / "served").fasp_plan is not None


def test_a_decilm_folder_is_no_form_of_ours_and_says_so(tmp_path):
    export_vllm(pruned("llama-gqa", UNEVEN), tmp_path / "served", check=False)
    with pytest.raises(FaspError):
        load_pruned(tmp_path / "served", trust_remote_code=True)


def test_it_is_overwritten_if_asked(tmp_path):
    model = pruned("llama-gqa", UNEVEN)
    for overwrite in (False, True):
        export_vllm(model, tmp_path / "served", check=False, overwrite=overwrite)
    with pytest.raises(FaspError, match="must be empty"):
        export_vllm(model, tmp_path / "served", check=False)


def test_without_vllm_there_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.delenv(answering.PYTHON, raising=False)
    monkeypatch.setattr(answering, "find_spec", lambda name: None)
    assert export_vllm(tiny_model("llama"), tmp_path / "served").check is None


def test_a_python_that_is_not_there_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv(answering.PYTHON, str(tmp_path / "none"))
    with pytest.raises(FaspError, match=f"{answering.PYTHON} must be the path of a python"):
        export_vllm(tiny_model("llama"), tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_paths_may_be_relative(tmp_path, monkeypatch):
    """Of the folder and of vLLM's python: one that answers nothing notes what it was asked."""
    monkeypatch.chdir(tmp_path)
    seen = tmp_path / "seen.txt"
    Path("python").write_text(f"#!/bin/sh\ncat > {seen}\necho asked >&2\n")
    Path("python").chmod(0o755)
    monkeypatch.setenv(answering.PYTHON, "python")
    with pytest.raises(FaspError, match="vLLM must serve what was written, but it says: asked"):
        export_vllm(tiny_model("llama"), "folder")
    assert Path(json.loads(seen.read_text())["folder"]).parent == tmp_path


def test_what_vllm_says_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(answering.PYTHON, sys.executable)  # which has no vLLM
    with pytest.raises(FaspError, match=r"vLLM must serve .* No module named 'vllm'"):
        export_vllm(tiny_model("llama"), tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(tmp_path):
    from fasp_lightning.training.modeling.lora import attach_lora

    model = tiny_model("llama")
    attach_lora(model, LoRAConfig(rank=2))
    with pytest.raises(FaspError, match="LoRA merged"):
        export_vllm(model, tmp_path / "served")


def test_an_answer_that_fails_names_what_was_behind_it():
    error = RuntimeError("Engine core initialization failed. See root cause above.")
    error.__cause__ = ValueError("head_dim=8 is unsupported")
    assert vllm_process.cause(error) == "ValueError: head_dim=8 is unsupported"


@needs_vllm
@pytest.mark.laws
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2"])
def test_vllm_gives_the_same_text(name, tmp_path, monkeypatch):
    heads_of_32 = TINY[name].options | {"hidden_size": 128, "sliding_window": None}  # vLLM's CPU kernels want no less
    monkeypatch.setitem(TINY, name, replace(TINY[name], options=heads_of_32))
    exported = export_vllm(pruned(name, UNEVEN), tmp_path / "served", dtype=torch.float32)
    assert exported.check.same == exported.check.tokens
