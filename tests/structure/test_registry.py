"""The table of architectures: complete, tested, open to new rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import PROVED
from tiny import MIXTURES, TINY, tiny_model
from tiny_pruning import BOTH, calibration
from transformers import AutoConfig, BertConfig

from fasp_lightning import ArchitectureSpec, CoupledPair, FASPPruner, register_architecture, spec_for
from fasp_lightning.structure import registry
from fasp_lightning.structure.registry import known_architectures

FAMILIES = ["opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
FAMILIES += ["gpt2", "gpt_neox", "bloom", "falcon"]
ROW = ArchitectureSpec("model.layers", (CoupledPair("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), "ffn"),))


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test adds are gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_has_a_row(model_type: str) -> None:
    assert model_type in known_architectures()


@pytest.mark.parametrize("model_type", known_architectures())
def test_every_row_has_a_tiny_model_or_is_proved(model_type: str) -> None:
    """Families that share a row stand for each other; tests/proving proves those of ``PROVED``."""
    tested = {tiny.model_type for tiny in (TINY | MIXTURES).values()} | PROVED.keys()
    assert registry._REGISTRY[model_type] in {registry._REGISTRY[name] for name in tested}
    assert model_type in tested or model_type not in FAMILIES


@pytest.mark.parametrize("model_type", known_architectures())
def test_every_row_prunes_values_and_ffn(model_type: str) -> None:
    first, *others = [pair.kind for pair in spec_for(AutoConfig.for_model(model_type)).pairs]
    latent = model_type in ("deepseek_v2", "deepseek_v3")  # no layer makes values alone
    assert first == ("ffn" if latent else "value")
    assert ([first] if latent else []) + others in (["ffn"], ["experts"], ["ffn", "experts"], ["ffn", "ffn", "experts"])


@pytest.mark.parametrize("family", TINY)
def test_row_is_found_by_model_and_by_config(family: str) -> None:
    model = tiny_model(family)
    assert spec_for(model) is spec_for(model.config) is registry._REGISTRY[TINY[family].model_type]


@pytest.mark.parametrize("family", TINY)
def test_width_field_holds_the_ffn_width_of_a_tiny_model(family: str) -> None:
    model = tiny_model(family)
    spec = spec_for(model)
    consumer = model.get_submodule(f"{spec.layers}.0.{spec.pairs[-1].consumer}")
    width = consumer.weight.shape[0 if spec.transposed else 1]
    if spec.width_field is None:
        assert width not in {value for key, value in model.config.to_dict().items() if "inner" in key or "ffn" in key}
    else:
        assert getattr(model.config, spec.width_field) == width


def test_unknown_model_type_lists_the_known_ones_and_the_row_to_register() -> None:
    with pytest.raises(ValueError, match="model_type must be one of") as caught:
        spec_for(BertConfig())
    message = str(caught.value)
    assert "got 'bert'" in message
    assert all(model_type in message for model_type in known_architectures())
    row = message[message.index("register_architecture(") :]
    exec(row, {name: globals()[name] for name in ("register_architecture", "ArchitectureSpec", "CoupledPair")})
    llama = spec_for(tiny_model("llama"))  # the row shown is one that can be pasted
    value, ffn = llama.pairs
    assert spec_for(BertConfig()) == replace(llama, pairs=(replace(value, groups=()), ffn))


def test_what_has_no_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a Hugging Face causal LM, got object"):
        spec_for(object())


def test_row_cannot_be_replaced_by_accident() -> None:
    before = spec_for(tiny_model("llama"))
    with pytest.raises(ValueError, match="model_type 'llama' is registered already; pass overwrite=True"):
        register_architecture("llama", ROW)
    assert spec_for(tiny_model("llama")) == before
    register_architecture("llama", ROW, overwrite=True)
    assert spec_for(tiny_model("llama")) == ROW


def test_registered_row_is_listed_and_prunes() -> None:
    model = tiny_model("llama")
    model.config.model_type = "my_type"
    register_architecture("my_type", ROW)
    assert "my_type" in known_architectures()
    report = FASPPruner().prune(model, calibration())  # "auto" takes the FFN where there is no value pair
    assert report.sparsity == pytest.approx(BOTH.sparsity, abs=0.01)
    assert {pair.kind for pair in report.pairs} == {"ffn"}
