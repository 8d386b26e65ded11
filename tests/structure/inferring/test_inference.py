"""Rows are found by changing outputs, and as they are shipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import TINY, tiny_model
from transformers import AutoConfig

from fasp_lightning import (
    ArchitectureSpec,
    CoupledPair,
    Experts,
    FaspError,
    infer_spec,
    register_architecture,
    spec_for,
)
from fasp_lightning.structure import registry
from fasp_lightning.structure.inferring.code import as_code

SHIPPED = [name for name in TINY if "falcon" not in name]


@pytest.mark.parametrize("name", SHIPPED)
def test_inferred_row_is_the_shipped_one(name: str) -> None:
    model = tiny_model(name)
    inferred, shipped = infer_spec(model), spec_for(model)
    if name == "gemma":  # of one KV head no group can go
        assert inferred == replace(shipped, pairs=(replace(shipped.pairs[0], groups=()), shipped.pairs[1]))
    elif name == "opt-350m":
        assert inferred.pairs == shipped.pairs  # without its projections it is another model
    else:
        assert inferred == shipped


def test_interleaved_values_of_kv_heads_are_found() -> None:
    assert infer_spec(tiny_model("falcon")) == spec_for(tiny_model("falcon"))


def test_blocks_of_a_hybrid_have_the_pairs_that_they_have() -> None:
    config = AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    spec = infer_spec(config)
    assert [pair.consumer for pair in spec.pairs] == ["self_attn.out_proj", "feed_forward.w2"]
    assert set(spec.pairs[1].producers) == {"feed_forward.w1", "feed_forward.w3"}


def test_norm_inside_the_ffn_hides_it() -> None:
    with pytest.raises(FaspError, match=r"of the linear layers of model.layers .*mlp.down_proj.* a norm, a mixer"):
        infer_spec(AutoConfig.for_model("bitnet"))


def test_experts_are_refused() -> None:
    with pytest.raises(FaspError, match=r"mixtral has experts, or several FFNs side by side \(model.layers.0.mlp"):
        infer_spec(AutoConfig.for_model("mixtral"))


def test_multi_head_latent_attention_is_no_value_pair() -> None:
    """Values share a layer with parts of keys, which no layout of a row says."""
    assert [pair.kind for pair in infer_spec(AutoConfig.for_model("minicpm3")).pairs] == ["ffn"]


def test_code_of_a_row_registers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    names = {"register_architecture": register_architecture, "ArchitectureSpec": ArchitectureSpec, "Experts": Experts}
    for model_type, spec in registry._SHIPPED.items():
        exec(as_code(model_type, spec), names | {"CoupledPair": CoupledPair})
    assert registry._REGISTRY == registry._SHIPPED


def test_pruned_model_carries_a_row_that_is_not_shipped() -> None:
    shipped = spec_for(tiny_model("llama"))
    assert registry.carried_row("llama", shipped) == {}
    for spec in (replace(shipped, packing=False), spec_for(tiny_model("phi3"))):
        config = type("Config", (), {"model_type": "own", "fasp": registry.carried_row("own", spec)})
        assert spec_for(config) == spec


def test_damaged_row_of_a_pruned_model_is_refused() -> None:
    config = type("Config", (), {"model_type": "own", "fasp": {"row": {"layers": "model.layers"}}})
    with pytest.raises(FaspError, match=r"config.fasp must hold the row"):
        spec_for(config)
