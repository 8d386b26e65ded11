"""What could not be saved or read back is found before anything is computed, and mended where it can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, pruned
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from fasp_lightning import FASPPruner, load_model, load_pruned, register_architecture, save_pruned, spec_for
from fasp_lightning.checkpoints.dry_save import require_savable

Change = Callable[[Any], object]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=3), use_cache=False).logits


def generation(**flags: object) -> Change:
    return lambda model: [setattr(model.generation_config, name, value) for name, value in flags.items()]


KEPT = {
    "temperature without sampling": {"temperature": 0.5, "do_sample": False},
    "and a padding token set by the user": {"temperature": 0.5, "pad_token_id": 1},
    "beams without beam search": {"length_penalty": 2.0},
}


@pytest.mark.parametrize("case", KEPT)
def test_generation_flags_that_transformers_refuses_to_save_are_saved(case: str, tmp_path: Path) -> None:
    model = pruned(config=FFN)
    generation(**KEPT[case])(model)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "stock")
    save_pruned(model, tmp_path / "p", verify=False)
    loaded = GenerationConfig.from_pretrained(tmp_path / "p")
    assert {name: getattr(loaded, name) for name in KEPT[case]} == KEPT[case]


@pytest.mark.parametrize("flags", [{"num_return_sequences": 3}, {"odd": torch.ones(1)}, None], ids=str)
def test_generation_flags_that_nothing_reads_are_left_out_with_a_warning(
    flags: dict[str, object] | None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = pruned(config=FFN)
    if flags is None:
        model.generation_config = {"max_length": 7}
    else:
        generation(**flags)(model)
    save_pruned(model, tmp_path / "p")
    assert "generation config saved as by default" in caplog.text
    assert load_pruned(tmp_path / "p").generation_config.eos_token_id == 2


def test_a_part_of_the_generation_config_that_is_plain_data_is_saved(tmp_path: Path) -> None:
    model = pruned(config=FFN)
    generation(watermarking_config={"greenlist_ratio": 0.5})(model)
    save_pruned(model, tmp_path / "p", verify=False)
    assert GenerationConfig.from_pretrained(tmp_path / "p").watermarking_config.greenlist_ratio == 0.5


def test_generation_flags_on_the_config_go_where_they_belong(tmp_path: Path) -> None:
    model = pruned(config=FFN)
    model.config.temperature = 0.8
    save_pruned(model, tmp_path / "p")
    assert load_pruned(tmp_path / "p").generation_config.temperature == 0.8
    assert model.config.temperature == 0.8


def test_a_model_is_as_before_after_a_dry_save() -> None:
    model = pruned()
    generation(temperature=0.5)(model)
    before = dict(vars(model))
    config = model.config.to_dict()
    require_savable(model)
    assert vars(model) == before
    assert model.config.to_dict() == config


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())


@pytest.mark.parametrize(("name", "change"), [("llama", tied), ("llama-gqa", untied)])
def test_a_head_is_read_back_as_it_is_in_memory(name: str, change: Change, tmp_path: Path) -> None:
    model = pruned(name)
    change(model)
    for form in ("compact", "zero_filled"):
        save_pruned(model, tmp_path / form, form=form)
        loaded = load_pruned(tmp_path / form)
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is (change is tied)


@pytest.mark.parametrize("method", ["gguf", "fp8"])
def test_dense_weights_are_saved_whatever_they_were_read_from(method: str, tmp_path: Path) -> None:
    model = pruned()
    model.config.quantization_config = {"quant_method": method}
    model.hf_quantizer, model.is_quantized = object(), True
    save_pruned(model, tmp_path / "p")
    loaded = load_pruned(tmp_path / "p")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(model))


def packed(model: Any) -> None:
    weight = torch.zeros(8, 8, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


def scaled(model: Any) -> None:
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


class Larger(LlamaForCausalLM):
    """A class that its config does not name."""


def of_another_class(model: Any) -> None:
    model.__class__, model.extra = Larger, nn.Linear(2, 2)


def masked(model: Any) -> None:
    prune.l1_unstructured(model.lm_head, "weight", 0.5)


def normed(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)


def of_more_tokens(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(101, 32))


REFUSED: dict[str, tuple[Change, str]] = {
    "packed": (packed, r"layers\.1\.mlp\.up_proj\.weight quantised \(torch\.uint8\)"),
    "8 bits": (scaled, r"quantised \(torch\.float8_e4m3fn\)"),
    "class": (of_another_class, r"parameters of the LlamaForCausalLM .* extra\.bias"),
    "mask": (masked, r"lm_head\.weight must be a parameter of its own to be saved, .* a mask .*prune\.remove\(layer, "),
    "weight norm": (normed, r"0\.self_attn\.q_proj\.weight must be .* WeightNorm; .*remove_parametrizations\(layer, "),
    "shape": (of_more_tokens, r"got model\.embed_tokens\.weight of \(101, 32\) instead of \(97, 32\).* vocab_size"),
    "config": (lambda model: setattr(model.config, "thing", object()), "cannot be saved .*not JSON serializable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_back_is_refused_by_name(case: str) -> None:
    change, message = REFUSED[case]
    model = tiny_model("llama")
    require_savable(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        require_savable(model)


def test_a_weight_of_8_bits_is_not_pruned() -> None:
    model = tiny_model("llama")
    scaled(model)
    with pytest.raises(ValueError, match=r"up_proj\.weight must be a plain dense tensor.*float8"):
        FASPPruner(FFN).prune(model, [])


class Refusing:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError("no vocabulary")


def test_a_tokenizer_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, got object"):
        require_savable(tiny_model("llama"), object())
    with pytest.raises(ValueError, match="tokenizer cannot be saved: no vocabulary; leave it out"):
        require_savable(tiny_model("llama"), Refusing())


def test_adapters_of_transformers_do_not_hinder_a_dry_save(tmp_path: Path) -> None:
    model = pruned(config=FFN)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    require_savable(model)
    with pytest.raises(ValueError, match="LoRA merged"):
        save_pruned(model, tmp_path / "p")


MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = self.config.factor * output.logits
        return output
"""
CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
    factor: float = 1.0
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own_code(tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of a class of its own, whose family is registered."""
    from fasp_lightning.structure import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_architecture("own", spec_for(tiny_model("llama")))
    folder = tiny_folder("llama")
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "factor": 2.0, "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config | own))
    return folder


def test_code_that_comes_with_a_model_is_saved_and_read_with_it(own_code: Path, tmp_path: Path) -> None:
    model = load_model(own_code, trust_remote_code=True)
    torch.testing.assert_close(logits(model), 2 * logits(tiny_model("llama")))
    FASPPruner(BOTH).prune(model, [random_tokens(4, 12)])
    loaders = {"compact": [load_pruned], "zero_filled": [load_pruned, load_model, AutoModelForCausalLM.from_pretrained]}
    for form in loaders:
        save_pruned(model, tmp_path / form, form=form)
        with pytest.raises(ValueError, match="pass trust_remote_code=True"):
            load_pruned(tmp_path / form)
        for load in loaders[form]:
            loaded = load(tmp_path / form, trust_remote_code=True)
            torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
