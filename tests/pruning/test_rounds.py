"""Pruning in rounds equals pruning again and again, but for own text, which is the original model's."""

import dataclasses

import pytest
from tiny import tiny_model
from tiny_pruning import assert_same, calibration

from fasp_lightning import FASPPruner, PruningConfig

SETTINGS = {
    "wanda": dict(score="wanda"),
    "fisher": dict(score="fisher", damping="auto"),
    "adaptive": dict(score="fisher", allocation="adaptive"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_rounds_are_two_prunings(settings: dict) -> None:
    config = PruningConfig(0.3, own_text=None, rounds=2, **settings)
    in_rounds, twice = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    report = FASPPruner(config).prune(in_rounds, calibration(8))
    for sparsity in (0.15, 0.3):
        last = FASPPruner(dataclasses.replace(config, sparsity=sparsity, rounds=1)).prune(twice, calibration(8))
    assert_same(in_rounds, twice)
    assert report.sparsity == last.sparsity
    assert report.parameters_before == sum(p.numel() for p in tiny_model("llama-gqa").parameters())
    assert len(report.pairs) > len(last.pairs)
    assert report.config["rounds"] == 2


def test_the_model_writes_its_text_once() -> None:
    model = tiny_model("llama-gqa")
    report = FASPPruner(PruningConfig(0.3, rounds=3)).prune(model, calibration(8))
    single = FASPPruner(PruningConfig(0.3)).prune(tiny_model("llama-gqa"), calibration(8))
    assert report.tokens == single.tokens


def test_a_round_that_rounding_leaves_empty_is_passed_over() -> None:
    config = PruningConfig(0.3, own_text=None, score="wanda", multiple_of=16)
    in_rounds, at_once = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    FASPPruner(dataclasses.replace(config, rounds=20)).prune(in_rounds, calibration(8))
    FASPPruner(config).prune(at_once, calibration(8))
    assert [block.keys() for block in in_rounds.fasp_plan.blocks] == [b.keys() for b in at_once.fasp_plan.blocks]
    widths = {len(pair.kept) for block in in_rounds.fasp_plan.blocks for pair in block.values()}
    assert widths == {len(pair.kept) for block in at_once.fasp_plan.blocks for pair in block.values()}


def test_progress_ends_at_its_total() -> None:
    events = []
    FASPPruner(PruningConfig(0.3, rounds=2)).prune(tiny_model("llama-gqa"), calibration(8), events.append)
    assert events[-1].done == events[-1].total
