"""Report and plan are read as one: what is told is of this model, and of these weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import basic
from transformers import PreTrainedModel

from fasp_lightning import FaspError, FASPPruner, load_pruned, save_pruned
from fasp_lightning.checkpoints.facts import facts_in, facts_of
from fasp_lightning.checkpoints.publishing.record import mark_of, record_of
from fasp_lightning.checkpoints.tasks.answers import Answers
from fasp_lightning.checkpoints.tasks.entries import entry_of
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.structure.plan import apply_plan

BATCHES = [random_tokens(2, 12)]

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens")


def pruned(**options: object) -> tuple[PreTrainedModel, PruningReport]:
    model = tiny_model("llama-gqa")
    return model, FASPPruner(basic(**{"sparsity": 0.2, "attention": "value_dims", **options})).prune(model, BATCHES)


def measured(model: PreTrainedModel) -> PreTrainedModel:
    """A model with perplexities in its report, as ``fasp prune`` leaves it."""
    figures = {"perplexity": 7.0, "seq_len": 12, "tokens": 22}
    text = {"name": "t", "domain": "other", "before": figures, "after": {**figures, "perplexity": 8.5}}
    model.fasp_report = {**model.fasp_report, "evaluation": [text], "weights": mark_of(model)}
    return model


def test_widths_errors_and_sparsities_are_those_of_the_pruning() -> None:
    model, report = pruned()
    facts = facts_of(record_of(model, model.dtype), model.fasp_plan, "compact")
    found = {
        (f"model.layers.{index}.{pair.consumer}", pair.original, width, pair.restored[index])
        for pair in facts.pairs
        for index, width in enumerate(pair.widths)
    }
    assert found == {(pair.layer, pair.width_before, pair.width_after, pair.error_after) for pair in report.pairs}
    assert facts.asked == 0.2
    assert facts.saved["sparsity"] == pytest.approx(report.sparsity)
    assert facts.saved["sparsity_total"] == pytest.approx(report.sparsity_total)
    assert facts.saved["parameters"] == report.parameters_after
    assert facts.saved["original_parameters"] == report.parameters_before


def test_of_several_rounds_the_last_errors_are_told() -> None:
    model, report = pruned(rounds=2)
    facts = facts_of(record_of(model, model.dtype), model.fasp_plan, "compact")
    assert len(report.pairs) == 8
    assert facts.fits
    assert [pair.restored[1] for pair in facts.pairs] == [pair.error_after for pair in report.pairs[-2:]]


def test_the_report_of_another_pruning_is_not_told() -> None:
    model, _ = pruned()
    report, plan = measured(model).fasp_report, pruned(sparsity=0.3)[0].fasp_plan
    apply_plan(model := tiny_model("llama-gqa"), plan)
    facts = facts_of(report, model.fasp_plan, "compact")
    assert not facts.fits
    assert not facts.texts
    assert not facts.settings
    assert facts.known("seconds") is None
    assert facts.pairs[0].widths == tuple(len(block[facts.pairs[0].consumer].kept) for block in plan.blocks)


DAMAGED = {"tasks": [{"answers": {"arc": 3}}, {"answers": {"arc": {"correct": "x"}}}, 3]}


@pytest.mark.parametrize("report", [{}, {"note": "mine"}, {"pairs": [{"layer": 3}]}, {"evaluation": ["x"]}, DAMAGED])
def test_any_report_is_taken(report: dict) -> None:
    facts = facts_of(report, pruned()[0].fasp_plan, "compact")
    assert [pair.kind for pair in facts.pairs] == ["value", "ffn"]
    assert not facts.texts
    assert not facts.tasks


def test_perplexities_are_those_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    model = measured(pruned()[0])
    save_pruned(model, tmp_path / "a", form="compact", dtype="bfloat16", verify=False)
    assert facts_in(tmp_path / "a").measured
    again = load_pruned(tmp_path / "a", dtype="float32")
    save_pruned(again, tmp_path / "b", form="zero_filled", verify=False)
    assert facts_in(tmp_path / "b").measured  # nothing was trained
    with torch.no_grad():
        again.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    save_pruned(again, tmp_path / "c", form="compact", verify=False)
    facts = facts_in(tmp_path / "c")
    assert not facts.measured
    assert facts.texts[0].after == 8.5  # told as what they are


def test_accuracies_are_those_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    model, answers = pruned()[0], {"arc": Answers("acc", "q", [1, 0])}
    model.fasp_report = {**model.fasp_report, "tasks": [entry_of(model, answers, None), {"weights": "of others"}, 3]}
    save_pruned(model, tmp_path / "a", form="compact", dtype="bfloat16", verify=False)
    again = load_pruned(tmp_path / "a", dtype="float32")
    save_pruned(again, tmp_path / "b", form="compact", verify=False)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert [[row.accuracy.value for row in found.rows] for found in facts_in(folder).tasks] == [[0.5]]
    with torch.no_grad():
        again.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    save_pruned(again, tmp_path / "c", form="compact", verify=False)
    assert facts_in(tmp_path / "c").tasks == ()


def test_a_report_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    model, _ = pruned()
    settings = {"source": str(tmp_path / "mine.txt"), "separator": "/", "mix": [{"source": "org/data"}]}
    model.fasp_report |= {"model": str(tmp_path / "base"), "calibration": settings}
    save_pruned(model, tmp_path / "p", form="compact", verify=False)
    text = (tmp_path / "p" / "fasp_report.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["calibration"] == settings | {"source": "mine.txt"}


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaspError, match=r"without config\.json"):
        facts_in(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FaspError, match="must carry a plan"):
        facts_in(tmp_path)
