"""A row is proved on a twin, and refused with what fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import PROVED
from tiny import tiny_model
from transformers import AutoConfig

from fasp_lightning import CoupledPair, FaspError, prove, spec_for
from fasp_lightning.proving.inferring import infer_proved
from fasp_lightning.structure.registry import has_row, registered

LLAMA = spec_for(AutoConfig.for_model("llama"))
VALUE, FFN = LLAMA.pairs


@pytest.mark.parametrize("model_type", PROVED)
def test_rows_without_a_tiny_model_hold(model_type: str) -> None:
    options, kinds = PROVED[model_type]
    found = prove(AutoConfig.for_model(model_type, **options))
    assert found.kinds == kinds
    assert set(found.stock) == set(kinds) - {"value"}


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        (replace(LLAMA, pairs=(replace(FFN, producers=("mlp.gate_proj",)),)), "pruning ffn pairs"),
        (replace(LLAMA, width_field="hidden_size"), "save → load, ffn pairs"),
        (replace(LLAMA, pairs=(replace(FFN, producers=("mlp.up_proj", "self_attn.q_proj")),)), "must have 48 rows"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_with_what_fails(spec, law: str) -> None:
    with pytest.raises(FaspError, match=law):
        prove(tiny_model("llama"), spec)


def test_statistics_that_are_not_those_of_whole_forwards_are_refused() -> None:
    """The parent of BERT's consumer has a norm behind it, so that what the attention returns is no sum with it."""
    config = AutoConfig.for_model("bert", is_decoder=True)
    found = infer_proved(config)
    assert [pair.kind for pair in found.spec.pairs] == ["ffn"]
    assert "statistics ≡ whole forwards" in found.dropped[0]


def test_proof_leaves_the_table_and_the_model_as_they_were() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prove(model, LLAMA)
    assert spec_for(model) is LLAMA
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with registered("some_type", LLAMA):
        pass
    assert not has_row(type("Config", (), {"model_type": "some_type"}))


def test_row_of_a_layer_that_no_block_has_is_refused() -> None:
    with pytest.raises(FaspError, match=r"must have a module 'mlp.other'"):
        prove(tiny_model("llama"), replace(LLAMA, pairs=(CoupledPair("mlp.other", ("mlp.up_proj",), "ffn"),)))
