"""What the figures of a pruning say about its restoration."""

from __future__ import annotations

import pytest
from tiny import HIDDEN, LAYERS, tiny_model
from tiny_pruning import BOTH, calibration

from fasp_lightning import FASPPruner
from fasp_lightning.pruning.perplexity import PerplexityResult
from fasp_lightning.pruning.report import TextReport, restoration_warning


def text(name: str, after: float, unrestored: float | None, domain: str = "other") -> TextReport:
    def result(perplexity: float) -> PerplexityResult:
        return PerplexityResult(perplexity, 1.0, 1, 1, 2, 1.0, 1.0)

    return TextReport(name, domain, result(10.0), result(after), None if unrestored is None else result(unrestored))


def test_harm_on_one_text_and_help_on_another_name_both() -> None:
    message = restoration_warning([text("wiki", 20.0, 25.0, "calibrated"), text("topics", 15.5, 12.0)])
    assert message is not None
    assert "raised the perplexity of topics from 12.00 to 15.50" in message
    assert "lowered that of wiki from 25.00 to 20.00" in message


def test_harm_alone_is_said_too() -> None:
    message = restoration_warning([text("wiki", 26.0, 25.0, "calibrated")])
    assert message is not None
    assert "lowered" not in message


@pytest.mark.parametrize("unrestored", [12.1, 12.0, 11.97, None])
def test_help_a_hair_and_nothing_measured_are_no_harm(unrestored: float | None) -> None:
    assert restoration_warning([text("wiki", 12.0, unrestored)]) is None


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
