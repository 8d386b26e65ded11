"""Rows of the table validate themselves."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from fasp_lightning import ArchitectureSpec, CoupledPair

VALUE = CoupledPair("self_attn.o_proj", producers=("self_attn.v_proj",), kind="value")
FFN = CoupledPair("mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"), kind="ffn")


def test_the_documented_row_is_enough() -> None:
    spec = ArchitectureSpec(layers="model.layers", pairs=(VALUE, FFN))
    assert (spec.width_field, spec.transposed, spec.attention) == ("intermediate_size", False, "self_attn")
    assert (VALUE.fused, FFN.fused) == (None, None)


def test_lists_become_tuples_so_that_rows_can_be_hashed() -> None:
    pair = CoupledPair("fc2", producers=["fc1"], kind="ffn")
    assert hash(ArchitectureSpec("layers", [pair])) == hash(ArchitectureSpec("layers", (pair,)))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "mlp"}, r"kind must be one of .*'ffn', 'value'.* got 'mlp'"),
        ({"fused": "stacked"}, r"fused must be one of .*'concatenated'.* got 'stacked'"),
        ({"producers": ()}, r"producers of 'fc2' must name at least one linear layer, got none"),
        ({"fused": "interleaved"}, r"fused='interleaved' is a layout of value pairs, got kind='ffn'"),
        ({"groups": ("q", "k", "v")}, r"groups must be .* of a value pair, .* kind 'ffn'"),
        ({"kind": "value", "groups": ("q", "k")}, r"groups must be the paths of queries, keys and values"),
        ({"kind": "value", "fused": "concatenated", "groups": ("q", "k", "v")}, r"the one path of their fused"),
    ],
)
def test_bad_pair_is_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        CoupledPair(**{"consumer": "fc2", "producers": ("fc1",), "kind": "ffn"} | changes)


@pytest.mark.parametrize(
    ("pairs", "options", "error"),
    [
        ((), {}, r"pairs must hold .* at least one in all, got kinds \[\]"),
        ((FFN, FFN), {}, r"one pair of a kind.* got kinds \['ffn', 'ffn'\]"),
        ((FFN, VALUE), {}, "value before ffn"),
        ((CoupledPair("o_proj", ("q_proj",), "groups"), FFN), {}, "whole KV groups go into a value pair's groups"),
        (
            (VALUE, FFN),
            {"attention": "attn"},
            "attention must be .* holds 'self_attn.o_proj', got 'attn'",
        ),
        ((VALUE, FFN), {"attention": "self"}, "attention must be the module that holds"),
    ],
)
def test_bad_row_is_refused(pairs: tuple[CoupledPair, ...], options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ArchitectureSpec("model.layers", pairs, **options)


def test_consumer_outside_an_attention_module_is_refused() -> None:
    with pytest.raises(ValueError, match="attention must be the module that holds 'o_proj'"):
        ArchitectureSpec("layers", (CoupledPair("o_proj", ("v_proj",), "value"),))


def test_row_without_a_value_pair_may_name_its_attention() -> None:
    assert ArchitectureSpec("layers", (FFN,)).attention is None
    assert ArchitectureSpec("layers", (FFN,), attention="mixer").attention == "mixer"


def test_rows_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        VALUE.kind = "ffn"
