"""A plan is plain data, and gives a fresh model the shapes of the pruned one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from oracle import mask_units
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, assert_unchanged, basic, calibration, pruned
from torch import nn

from fasp_lightning import FaspError, FASPPruner, PairLayout, PairPlan, PruningConfig, PruningPlan, apply_plan
from fasp_lightning.structure.plan import plan_of

FC2 = "fc2"


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def edited(plan: PruningPlan, **changes: Any) -> PruningPlan:
    """A plan whose FFN pair of block 1 is changed."""
    pair = plan.blocks[1][FC2]
    layout = replace(pair.layout, width=changes.pop("width", pair.layout.width))
    return replace(plan, blocks=(plan.blocks[0], {**plan.blocks[1], FC2: replace(pair, layout=layout, **changes)}))


@pytest.mark.parametrize("family", TINY)
def test_json_keeps_the_plan(family: str) -> None:
    plan = pruned(family, batches=calibration(4)).fasp_plan
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()


@pytest.mark.parametrize("family", TINY)
def test_plan_gives_a_fresh_model_the_same_shapes(family: str) -> None:
    model = pruned(family, batches=calibration(4))
    fresh = apply_plan(tiny_model(family), model.fasp_plan)
    assert shapes(fresh) == shapes(model)
    assert fresh.fasp_plan == model.fasp_plan
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(random_tokens()).logits, model(random_tokens()).logits)


@pytest.mark.parametrize("family", TINY)
def test_applied_plan_keeps_the_weights(family: str) -> None:
    plan = pruned(family, batches=calibration(4)).fasp_plan
    fresh, masked = apply_plan(tiny_model(family), plan), mask_units(tiny_model(family), plan)
    with torch.no_grad():
        torch.testing.assert_close(fresh(random_tokens()).logits, masked(random_tokens()).logits, atol=1e-4, rtol=0)


def test_plan_applies_to_a_model_without_weights() -> None:
    model = pruned()
    with torch.device("meta"):
        fresh = type(model)(TINY["llama"].config())
    assert shapes(apply_plan(fresh, model.fasp_plan)) == shapes(model)


def test_plan_applies_to_a_model_that_was_pruned_less() -> None:
    model = pruned(config=basic(0.1, attention="value_dims"))
    half = copy.deepcopy(model)
    FASPPruner(basic(0.3, attention="value_dims")).prune(model, calibration())
    assert shapes(apply_plan(half, model.fasp_plan)) == shapes(model)


@pytest.mark.parametrize("family", [name for name in TINY if name != "bloom"])
def test_config_holds_the_width(family: str) -> None:
    model = pruned(family, FFN)
    widths = {len(block[path].kept) for block in model.fasp_plan.blocks for path in block}
    assert len(widths) == 1
    changed = {
        name: value
        for name, value in model.config.to_dict().items()
        if name != "fasp" and value != tiny_model(family).config.to_dict()[name]
    }
    assert list(changed.values()) == list(widths)


def test_config_of_bloom_stays_as_it_is() -> None:
    config = pruned("bloom", FFN, calibration(4)).config.to_dict()
    assert config.pop("fasp")["form"] == "compact"
    assert config == tiny_model("bloom").config.to_dict()


def test_model_that_was_never_pruned_has_no_plan() -> None:
    assert plan_of(tiny_model("llama")) is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kept": [5, 3]}, "must keep ascending units"),
        ({"kept": [3, 3]}, "must keep ascending units"),
        ({"kept": [0, 48]}, "must keep ascending units out of the 48"),
        ({"kept": [-1, 4]}, "must keep ascending units"),
        ({"kept": []}, "must keep ascending units"),
        ({"width": 49}, "must be for PairLayout.*width=48.*got .*width=49"),
    ],
    ids=["descending", "twice", "too-large", "negative", "none", "other-width"],
)
def test_plan_that_does_not_fit_is_refused_before_the_first_cut(changes: dict[str, Any], error: str) -> None:
    plan, fresh = edited(pruned("opt").fasp_plan, **changes), tiny_model("opt")
    with pytest.raises(ValueError, match=rf"plan of model\.decoder\.layers\.1\.fc2 {error}"):
        apply_plan(fresh, plan)
    assert_unchanged(fresh, "opt")


def test_plan_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="plan must be one of a mistral model, got one of 'llama'"):
        apply_plan(tiny_model("mistral"), pruned().fasp_plan)


def test_plan_of_another_depth_is_refused() -> None:
    plan = pruned().fasp_plan
    shallow = PruningPlan(plan.model_type, plan.blocks[:1])
    with pytest.raises(ValueError, match="plan must have 2 blocks as the model has, got 1"):
        apply_plan(tiny_model("llama"), shallow)


def test_plan_that_names_an_unknown_consumer_is_refused() -> None:
    plan = pruned().fasp_plan
    renamed = {"mlp.c_proj" if path == "mlp.down_proj" else path: pair for path, pair in plan.blocks[0].items()}
    fresh = tiny_model("llama")
    with pytest.raises(ValueError, match=r"plan of model\.layers\.0 .*mlp\.c_proj"):
        apply_plan(fresh, PruningPlan(plan.model_type, (renamed, plan.blocks[1])))
    assert_unchanged(fresh)


@pytest.mark.parametrize("config", [basic(0.1, attention="value_dims"), FFN], ids=["less", "another-pair"])
def test_plan_cannot_bring_units_back(config: PruningConfig) -> None:
    model, other = pruned(config=BOTH), pruned(config=config)
    before = shapes(model)
    with pytest.raises(ValueError, match=r"must keep ascending units out of the \d+ that are left"):
        apply_plan(model, other.fasp_plan)
    assert shapes(model) == before


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "a plan must be a mapping with version 1"),
        ('{"version": 2, "model_type": "llama", "blocks": []}', "with version 1"),
        ('{"version": 1, "blocks": 0, "pairs": [], "kept": "eJwDAAAAAAE="}', "must hold model_type"),
        ('{"version": 1, "model_type": "llama"}', "missing: 'blocks'"),
        ('{"version": 1, "model_type": "llama", "blocks": 1, "kept": "eJwDAAAAAAE=", "pairs": [{}]}', "producer_rows"),
        ('{"version": 1, "model_type": "llama", "blocks": [7]}', "a plan must hold"),
        ("{", "Expecting property name"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PruningPlan.from_json(text)


def damaged(**changes: Any) -> dict[str, Any]:
    """The plain form of a plan, its first pair or itself changed."""
    data = pruned("opt").fasp_plan.to_dict()
    data["pairs"][0].update({name: value for name, value in changes.items() if name in data["pairs"][0]})
    return data | {name: value for name, value in changes.items() if name in data}


@pytest.mark.parametrize(
    "changes",
    [
        {"units": [24, 23]},
        {"units": [24]},
        {"units": [24, None]},
        {"units": 24},
        {"width": 64},
        {"width": "many"},
        {"kept": "eJwDAAAAAAE="},
        {"kept": "kept"},
        {"kept": "ä"},
        {"blocks": 3},
        {"blocks": -1},
        {"pairs": {}},
        {"pairs": [7]},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FaspError, match="a plan must hold"):
        PruningPlan.from_dict(damaged(**changes))


def test_blocks_whose_pair_has_another_layout_come_back() -> None:
    first, second = PairLayout("ffn", 9, 1, 1, None, (9,)), PairLayout("ffn", 17, 1, 1, None, (17,))
    blocks = ({"fc2": PairPlan(first, (0, 8))}, {}, {"fc2": PairPlan(second, (7, 8, 16))})
    plan = PruningPlan("opt", blocks)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_plan_of_a_large_model_is_small() -> None:
    """What 80 blocks of 28672 FFN units and 1024 value dims would add to a config."""
    generator = torch.Generator().manual_seed(0)
    blocks: list[dict[str, PairPlan]] = [{}, {}]
    for block, (path, width) in product(blocks, (("down", 28672), ("o", 1024))):
        kept = torch.rand(width, generator=generator).gt(0.2).nonzero().squeeze(1)
        block[path] = PairPlan(PairLayout("ffn", width, 1, 1, None, (width,)), tuple(kept.tolist()))
    size = len(PruningPlan("llama", tuple(blocks)).to_json())
    assert size * 40 < 0.4e6
