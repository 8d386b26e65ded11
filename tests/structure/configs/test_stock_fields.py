"""What a stock config can say of widths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tiny import TINY, tiny_model

from fasp_lightning import spec_for
from fasp_lightning.structure.configs.stock_fields import accepts, groups_obstacle, own_config, stock_fields
from fasp_lightning.structure.plan import resolve_pruned


@pytest.mark.parametrize("family", TINY)
def test_config_with_its_own_fields_builds_the_same_model(family: str) -> None:
    model, spec = tiny_model(family), spec_for(tiny_model(family))
    ffn = resolve_pruned(model)[0][-1]
    fields = stock_fields(spec, ffn.spec.consumer, ffn.layout, ffn.layout.width)
    assert fields == ({} if spec.width_field is None else {spec.width_field: ffn.layout.width})
    assert accepts(model.config, fields)


def test_value_dims_stand_in_no_stock_config() -> None:
    model = tiny_model("llama")
    assert stock_fields(spec_for(model), "self_attn.o_proj", resolve_pruned(model)[0][0].layout, 8) == {}


def test_kv_groups_name_both_head_counts_and_the_head_size() -> None:
    model = tiny_model("llama-gqa")
    layout = resolve_pruned(model, whole={"groups"})[0][0].layout
    assert stock_fields(spec_for(model), "self_attn.o_proj", layout, 1) == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }


def test_what_a_config_class_refuses_is_not_accepted() -> None:
    config = tiny_model("gemma3").config
    assert not accepts(config, {"num_attention_heads": "three"})


@pytest.mark.parametrize(
    ("family", "obstacle"), [("llama", None), ("opt", "stock code ties"), ("gpt2", "stock code ties")]
)
def test_an_obstacle_to_fewer_groups_is_named(family: str, obstacle: str | None) -> None:
    model = tiny_model(family)
    found = groups_obstacle(spec_for(model), model.config)
    assert found is None if obstacle is None else obstacle in (found or "")


def test_an_interrupt_leaves_no_module_with_another_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    shared, modules = model.config, model.modules

    def interrupted() -> Any:
        monkeypatch.undo()
        yield from itertools.islice(modules(), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "modules", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_config(model)
    configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert configs == {id(model.config)}
    assert model.config is not shared
