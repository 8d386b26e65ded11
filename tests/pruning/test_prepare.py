"""What is measured once serves prunings to several sparsities, as if each had measured it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import assert_same, assert_unchanged, basic, calibration

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning import prepare as preparing
from fasp_lightning.pruning import pruner
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.prepare import Prepared
from fasp_lightning.pruning.progress import ProgressEvent

OWN = OwnTextConfig(tokens=100, seq_len=20, share=0.4)
SETTINGS: dict[str, dict[str, Any]] = {
    "fisher": {"score": "fisher"},
    "adaptive": {"score": "wanda", "allocation": "adaptive"},
    "own text": {"own_text": OWN},
    "everything": {"score": "fisher", "allocation": "adaptive", "own_text": OWN, "damping": "auto"},
    "groups": {"score": "fisher", "attention": "kv_groups"},
    "few tokens": {"score": "fisher", "sensitivity_tokens": 40, "own_text": OWN},
}
FISHER = basic(score="fisher")


def config(settings: str, sparsity: float) -> PruningConfig:
    return basic(sparsity, **{"attention": "value_dims", **SETTINGS[settings]})


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["opt", "llama-gqa"])
def test_copies_pruned_from_one_preparation_equal_those_pruned_alone(family: str, settings: str) -> None:
    """Bit for bit; the model itself, and what was prepared, stay as they are."""
    if settings == "groups":
        family = "llama"
    model = tiny_model(family)
    prepared = FASPPruner(config(settings, 0.1)).prepare(model, iter(calibration(5)))
    assert_unchanged(model, family)
    for sparsity in (0.35, 0.15):
        shared, alone = tiny_model(family), tiny_model(family)
        first = FASPPruner(config(settings, sparsity)).prune(shared, prepared)
        second = FASPPruner(config(settings, sparsity)).prune(alone, calibration(5))
        assert_same(shared, alone)
        assert [replace(pair, seconds=0.0) for pair in first.pairs] == [
            replace(pair, seconds=0.0) for pair in second.pairs
        ]
        assert first.tokens == second.tokens


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_own_text_starts_like_the_calibration_text_if_there_is_one(share: float) -> None:
    settings = basic(own_text=replace(OWN, share=share))
    batches = [torch.tensor([[7, 8, 9, 10], [6, 8, 9, 10]])]
    *_, own = FASPPruner(settings).prepare(tiny_model("opt"), batches).batches
    ids = own["input_ids"] if isinstance(own, dict) else own
    assert set(ids[:, 0].tolist()) == ({6, 7} if share < 1 else {1})


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = FASPPruner(config("everything", 0.2)).prepare(tiny_model("opt"), calibration(5))
    monkeypatch.setattr(preparing, "own_text", None)
    monkeypatch.setattr(preparing, "fisher_scores", None)
    FASPPruner(config("everything", 0.3)).prune(tiny_model("opt"), prepared)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, False), ({"score": "magnitude"}, False), ({"score": "fisher"}, True), ({"allocation": "adaptive"}, True)],
)
def test_sensitivity_is_measured_where_a_setting_reads_it(settings: dict[str, Any], needed: bool) -> None:
    chosen = basic(**settings)
    assert chosen.needs_sensitivity == needed
    prepared = FASPPruner(chosen).prepare(tiny_model("llama"), calibration())
    assert bool(prepared.sensitivity) == needed
    assert len(prepared.batches) == 3


def test_sensitivity_is_of_each_pair_and_unit() -> None:
    prepared = FASPPruner(FISHER).prepare(tiny_model("llama-gqa"), calibration())
    assert [[tuple(score.shape) for score in block] for block in prepared.sensitivity] == [[(16,), (48,)]] * 2


def prepared_with(**options: Any) -> Prepared:
    return FASPPruner(basic(**options)).prepare(tiny_model("llama"), calibration())


@pytest.mark.parametrize("settings", [{"score": "fisher"}, {"allocation": "adaptive"}])
def test_preparation_without_sensitivity_is_refused_where_it_is_needed(settings: dict[str, Any]) -> None:
    model, prepared = tiny_model("llama"), prepared_with()
    with pytest.raises(ValueError, match="batches must be prepared with the score and allocation"):
        FASPPruner(basic(**settings)).prune(model, prepared)
    assert_unchanged(model)


OTHERS = {
    "other-shapes": ("llama-gqa", {}, None),
    "other-blocks": ("gemma3", {}, None),
    "pruned-since": ("llama", {}, 0.1),
    "other-units": ("llama", {"attention": "kv_groups"}, None),
}


@pytest.mark.parametrize(("name", "options", "before"), OTHERS.values(), ids=OTHERS)
def test_preparation_of_another_model_is_refused(name: str, options: dict[str, Any], before: float | None) -> None:
    model, prepared = tiny_model(name), prepared_with(score="fisher")
    if before is not None:
        FASPPruner(basic(before, attention="value_dims")).prune(model, calibration())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="batches must be prepared with this model as it is, or a copy of it"):
        FASPPruner(replace(FISHER, **options)).prune(model, prepared)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_sparsity_zero_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner, "prepare", None)
    model = tiny_model("opt")
    report = FASPPruner(config("everything", 0.0)).prune(model, calibration())
    assert report.sparsity == 0
    assert not any(model.fasp_plan.blocks)


@pytest.mark.parametrize("settings", SETTINGS)
def test_progress_ends_at_its_total(settings: str) -> None:
    events: list[ProgressEvent] = []
    FASPPruner(config(settings, 0.2)).prune(tiny_model("llama"), calibration(5), events.append)
    assert [event.done for event in events] == list(range(1, len(events) + 1))
    assert events[-1].total == len(events)
    if config(settings, 0.2).allocation == "uniform":  # else a pair that is small may lose nothing in the end
        assert {event.total for event in events} == {len(events)}  # sensitivity is a part of it
    phases = [event.phase for event in events]
    assert ("sensitivity" in phases) == config(settings, 0.2).needs_sensitivity


def test_seconds_of_own_text_and_sensitivity_are_told() -> None:
    report = FASPPruner(config("everything", 0.2)).prune(tiny_model("opt"), calibration(5))
    assert {"own text", "sensitivity", "capture", "total"} <= set(report.seconds)
    parts = sum(seconds for phase, seconds in report.seconds.items() if phase != "total")
    assert 0 < parts <= report.seconds["total"]


def test_one_huge_batch_is_cut_for_the_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on the tokens asked for, and at most an eighth more."""
    taken: list[int] = []
    spread = preparing.spread_samples

    def watched(*arguments: Any) -> Any:
        chosen = spread(*arguments)
        taken.append(sum(sample.tokens for sample in chosen))
        return chosen

    monkeypatch.setattr(preparing, "spread_samples", watched)
    ids = random_tokens(64, 20)
    settings = basic(score="fisher", sensitivity_tokens=320)
    whole = FASPPruner(settings).prepare(tiny_model("llama"), [ids])
    pieces = FASPPruner(settings).prepare(tiny_model("llama"), list(ids.split(2)))
    assert taken == [320, 320]
    for block, other in zip(whole.sensitivity, pieces.sensitivity, strict=True):
        assert all(torch.equal(*scores) for scores in zip(block, other, strict=True))


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], "at least one calibration batch with a token in it, got none; set own_text"),
        ([{"input_ids": random_tokens(), "attention_mask": torch.zeros(2, 12).long()}], "with a token in it"),
        ([random_tokens(), torch.full((1, 5), 97)], r"input_ids must be in \[0, 97\)"),
        ([random_tokens(), random_tokens().int()], "input_ids must be int64"),
    ],
)
def test_batches_are_refused_before_own_text_is_written(
    batches: list[Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "own_text", lambda *_: pytest.fail("own text was written"))
    for call in (FASPPruner(basic(own_text=OWN)).prune, FASPPruner(basic(own_text=OWN)).prepare):
        with pytest.raises(ValueError, match=error):
            call(tiny_model("llama"), batches)
