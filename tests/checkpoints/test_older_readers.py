"""Saved folders that transformers 4 and converters read as transformers 5 does."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, WINDOW, Tiny, random_tokens, tiny_model
from tiny_pruning import plan_keeping, uneven
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from fasp_lightning import apply_plan, load_pruned, save_pruned
from fasp_lightning.checkpoints.exporting.exported import reference
from fasp_lightning.training.modeling.export import export_model

OLDER = "FASP_OLDER_PYTHON"
SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "loader_answers.py"
BASE = {"rope_type": "default", "rope_theta": 500.0}
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", BASE, {"rope_theta": 500.0}),
    "linear": (
        "qwen2",
        BASE | {"rope_type": "linear", "factor": 4.0},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "dynamic": (
        "llama",
        BASE | {"rope_type": "dynamic", "factor": 4.0},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama3": (
        "llama",
        BASE
        | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_theta": 500.0},
    ),
    "yarn": (
        "qwen3",
        BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_theta": 500.0},
    ),
    "local": (
        "gemma3",
        {"sliding_attention": BASE, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}},
        {
            "rope_theta": 5000.0,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "partial": (
        "phi",
        BASE | {"partial_rotary_factor": 0.25},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
    ),
    "pct": (
        "gpt_neox",
        BASE | {"partial_rotary_factor": 0.5},
        {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    ),
    "longrope": (
        "phi3",
        BASE
        | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
        | {"original_max_position_embeddings": 16},
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
}
"""A family, its rope in transformers 5, and what transformers 4 wants to read of it."""


@pytest.fixture(params=ROPES)
def rope(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Name of a tiny model that has such a rope, and the fields that its saved config must have."""
    family, parameters, fields = ROPES[request.param]
    monkeypatch.setitem(TINY, "rope", with_rope(family, parameters))
    return "rope", fields


def with_rope(family: str, parameters: dict[str, Any]) -> Tiny:
    options = copy.deepcopy({"rope_parameters": parameters})  # which transformers completes in place
    if family == "phi3":
        options["original_max_position_embeddings"] = 16
    return Tiny(TINY[family].model_type, TINY[family].options | options, TINY[family].attention)


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def cut(name: str, form: str) -> nn.Module:
    """A tiny model that such a form holds."""
    return apply_plan(
        tiny_model(name), plan_keeping(tiny_model(name), "ffn", *((40,) if form == "stock" else (30, 40)))
    )


@pytest.mark.parametrize("form", ["stock", "zero_filled"])
def test_config_says_rope_and_dtype_as_transformers_4_reads_them(
    rope: tuple[str, dict[str, Any]], form: str, tmp_path: Path
) -> None:
    name, fields = rope
    save_pruned(cut(name, form), tmp_path / "p", form=form, verify=False)
    saved = config_in(tmp_path / "p")
    assert saved | fields | {"torch_dtype": "float32"} == saved


def test_transformers_5_reads_the_same_and_saves_the_same_again(
    rope: tuple[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = cut(rope[0], "stock")
    save_pruned(model, tmp_path / "p", verify=False)
    before, read = told(model.config.to_dict()), told(AutoConfig.from_pretrained(tmp_path / "p").to_dict())
    assert read == before
    with caplog.at_level(logging.WARNING):
        loaded = load_pruned(tmp_path / "p")
    assert not [record for record in caplog.records if "deprecated" in record.message]
    save_pruned(loaded, tmp_path / "again", verify=False)
    assert told(config_in(tmp_path / "again")) == told(config_in(tmp_path / "p"))


def told(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what saving always changes, and without what Phi-3 stores twice."""
    config["rope_parameters"].pop("type", None)
    twice = {"partial_rotary_factor"} if config["model_type"] == "phi3" else set()
    saving = {"fasp", "architectures", "transformers_version", "_name_or_path", "dtype"}
    return {name: value for name, value in config.items() if name not in saving | twice}


def test_dense_models_that_are_exported_are_dressed_too(tmp_path: Path, tiny_tokenizer: Any) -> None:
    export_model(tiny_model("llama"), tmp_path / "p", tiny_tokenizer)
    assert config_in(tmp_path / "p")["rope_theta"] == 10000.0
    assert "PreTrainedTokenizerFast" in (tmp_path / "p" / "tokenizer_config.json").read_text(encoding="utf-8")


def test_tokenizer_has_a_class_that_transformers_4_knows_and_is_the_same_in_5(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    given = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer._tokenizer, bos_token="<bos>", extra_special_tokens=["!", "?"]
    )
    save_pruned(uneven(), tmp_path / "p", given, verify=False)
    saved = json.loads((tmp_path / "p" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["!", "?"]
    assert "extra_special_tokens" not in saved  # of which transformers 4 takes a dict alone
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    read = AutoTokenizer.from_pretrained(tmp_path / "p")
    assert type(read) is type(given)
    assert read("Hello?!")["input_ids"] == given("Hello?!")["input_ids"]
    assert read.extra_special_tokens == given.extra_special_tokens


def test_class_that_both_know_is_kept_and_says_that_it_adds_no_bos(tmp_path: Path) -> None:
    given = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4}, merges=[])
    save_pruned(uneven(), tmp_path / "p", given, verify=False)
    saved = json.loads((tmp_path / "p" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "LlamaTokenizer"
    assert saved["add_bos_token"] is False
    assert AutoTokenizer.from_pretrained(tmp_path / "p")("a")["input_ids"] == given("a")["input_ids"]


def test_compact_folder_names_an_architecture_that_no_converter_knows(tmp_path: Path) -> None:
    model = uneven()
    save_pruned(model, tmp_path / "p", form="compact")
    assert config_in(tmp_path / "p")["architectures"] == ["FaspCompactLlamaForCausalLM"]
    loaded = load_pruned(tmp_path / "p")
    assert torch.equal(loaded(random_tokens()).logits, model(random_tokens()).logits)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    save_pruned(loaded, tmp_path / "again")
    assert config_in(tmp_path / "again")["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.older_transformers
@pytest.mark.skipif(OLDER not in os.environ, reason=f"{OLDER} names no python that has transformers 4")
def test_transformers_4_goes_on_with_the_same_text(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``FASP_OLDER_PYTHON=ENVIRONMENT/bin/python make test ARGS='-m older_transformers'`` runs it."""
    for name, (family, parameters, _) in ROPES.items():
        monkeypatch.setitem(TINY, f"older-{name}", with_rope(family, parameters))
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    monkeypatch.setitem(TINY, "older-window", Tiny("qwen2", TINY["qwen2"].options | window))
    expected, prompt = {}, tiny_tokenizer("Hello, world")["input_ids"]
    for name, form in itertools.product(TINY, ("stock", "zero_filled")):
        if (name, form) != ("bloom", "stock"):  # whose FFN width is fixed in its code
            model = cut(name, form)
            folder = save_pruned(model, tmp_path / f"{name}-{form}", tiny_tokenizer, form=form).path
            expected[str(folder)] = list(reference(model, prompt).greedy)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ[OLDER], str(SCRIPT), "transformers", "--text", "Hello, world", *expected]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["version"].split(".")[0] for answer in answers} == {"4"}
    assert {answer["folder"]: answer.get("greedy", answer.get("error")) for answer in answers} == expected
