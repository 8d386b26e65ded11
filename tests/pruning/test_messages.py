"""What the engine says: warnings, progress, report, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import HIDDEN, LAYERS, TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, assert_unchanged, calibration

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning.progress import ProgressEvent


def test_few_tokens_are_warned_of_with_both_numbers() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 20)
    with pytest.warns(UserWarning, match=r"40 calibration tokens are fewer than the 48 columns"):
        report = FASPPruner(BOTH).prune(model, [tokens])
    assert len([message for message in report.warnings if "40" in message and "48" in message]) == 1


def test_enough_tokens_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = FASPPruner(BOTH).prune(tiny_model("llama"), [random_tokens(2, 24)])
    assert (report.tokens, report.warnings) == (48, [])


def test_singular_gram_is_warned_of_by_layer() -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = FASPPruner(replace(FFN, damping=0.0)).prune(tiny_model("llama"), [random_tokens(1, 20)])
    few, *singular = report.warnings
    assert "20 calibration tokens" in few
    for message, pair in zip(singular, report.pairs, strict=True):
        assert message.startswith(f"{pair.layer}: the gram was singular; solved by {pair.solver} with damping ")
        assert pair.damping > 0


def test_progress_ends_at_its_total() -> None:
    events: list[ProgressEvent] = []
    FASPPruner(BOTH).prune(tiny_model("llama"), calibration(), events.append)
    assert [event.done for event in events] == list(range(1, events[-1].total + 1))
    assert {event.total for event in events} == {events[-1].done}
    assert [event.block for event in events] == sorted(event.block for event in events)
    assert {event.blocks for event in events} == {LAYERS}


def test_report_holds_widths_errors_and_seconds() -> None:
    model = tiny_model("llama")
    report = FASPPruner(BOTH).prune(model, calibration())
    assert [pair.kind for pair in report.pairs] == ["value", "ffn"] * LAYERS
    assert [pair.width_before for pair in report.pairs] == [HIDDEN, 48] * LAYERS
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert {"capture", "forward", "gram", "solve", "cut", "apply", "total"} <= set(report.seconds)
    parts = sum(seconds for phase, seconds in report.seconds.items() if phase != "total")
    assert 0 < parts <= report.seconds["total"]
    assert report.peak_memory["rss"] > 1e7
    plain = report.to_dict()
    assert plain["pairs"][0]["width_after"] == report.pairs[0].width_after
    assert model.fasp_report == plain


@pytest.mark.parametrize(
    ("batches", "error"),
    [([], "at least one calibration batch"), ([torch.tensor([[1, 97]])], r"input_ids must be in \[0, 97\).* got 97")],
    ids=["none", "outside-the-vocabulary"],
)
def test_bad_batches_leave_the_model_alone(batches: list[Any], error: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=error):
        FASPPruner(BOTH).prune(model, batches)
    assert_unchanged(model)


def test_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(TINY["llama"].config())
    with pytest.raises(ValueError, match=r"weights in memory, got .* on the meta device"):
        FASPPruner().prune(model, calibration())


def test_refusals_come_before_the_first_batch() -> None:
    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    for config, error in (
        (PruningConfig(0.99), "sparsity must be at most"),
        (PruningConfig(multiple_of=99), "multiple_of"),
    ):
        with pytest.raises(ValueError, match=error):
            FASPPruner(config).prune(tiny_model("llama"), batches())
