"""A model card says what is known of its model, and nothing else, in a form that the hub reads."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import tiny_model
from tiny_pruning import FFN, basic, pruned

from fasp_lightning import load_pruned, save_pruned
from fasp_lightning.checkpoints.facts import facts_of
from fasp_lightning.checkpoints.forms import LoaderSupport
from fasp_lightning.checkpoints.publishing import picture
from fasp_lightning.checkpoints.publishing.base import base_of
from fasp_lightning.checkpoints.publishing.card import write_card
from fasp_lightning.checkpoints.tasks.answers import Answers, Measured
from fasp_lightning.checkpoints.tasks.entries import entry_of
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan

pytestmark = pytest.mark.usefixtures("drawn")

HOSTILE = "a | b\n# c: `d` <script> [e](f) *g* _h_ $i$ \"j\" 'k' & \\ ---"
LOADERS = [LoaderSupport("ours", True, "it does"), LoaderSupport("theirs|x", None, HOSTILE)]


def plan(widths: list[int], kind: str = "ffn") -> PruningPlan:
    layout = PairLayout(kind, 64, 1, 1, None, (64, 64))
    return PruningPlan("llama", tuple({"mlp.down_proj": PairPlan(layout, tuple(range(width)))} for width in widths))


def report(widths: list[int], **entries: Any) -> dict[str, Any]:
    """As ``save_pruned`` writes one after ``fasp prune``."""
    names = ("layer", "width_before", "width_after", "error_before", "error_after")
    pairs = [(f"model.layers.{at}.mlp.down_proj", 64, width, 0.4, 0.1) for at, width in enumerate(widths)]
    figures = {"seq_len": 128, "tokens": 254}
    text = {"name": "topics (test)", "domain": "other", "bos": "<s>"}
    text |= {"before": {"perplexity": 17.25, **figures}, "after": {"perplexity": 19.5, **figures}}
    saved = {"sparsity": 0.2033, "sparsity_total": 0.17, "parameters": 830, "original_parameters": 1000}
    made = {
        "pairs": [dict(zip(names, pair, strict=True)) for pair in pairs],
        "tokens": 4096,
        "parameters_before": 1000,
        "config": {"sparsity": 0.2, "own_text": {"tokens": 512, "share": 0.33}},
        "calibration": {"name": "mine.txt"},
        "seconds": {"solve": 1.0, "total": 2.5},
        "peak_memory": {"rss": 2**30},
        "evaluation": [text],
        "computed": {"dtype": "float32", "device": "cpu"},
        "saved": {**saved, "measured": True, "dtype": "bfloat16", "versions": {"torch": "2.9"}},
        "base": {"name": "org/base", "id": "org/base", "license": "apache-2.0"},
    }
    return {**made, **entries}


def card(folder: Path, told: dict[str, Any], widths: list[int], form: str = "stock") -> ModelCard:
    write_card(folder, facts_of(told, plan(widths), form), LOADERS, None, False)
    return ModelCard.load(folder / "README.md")


def cells(text: str) -> list[list[str]]:
    """The rows of all tables as a reader of Markdown sees them."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "tr_open":
            rows.append([])
        elif before and before.type in ("th_open", "td_open"):
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


def test_the_hub_reads_base_license_and_perplexity(tmp_path: Path) -> None:
    data = card(tmp_path, report([32, 32]), [32, 32]).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "finetune", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "text-generation", ["perplexity"])
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("topics (test)", "perplexity", 19.5)
    assert result.dataset_args == {"seq_len": 128, "predicted_tokens": 254}
    assert card(tmp_path, report([32, 32]), [32, 32], "compact").data.library_name == "fasp_lightning"


def test_the_figures_stand_with_their_protocol(tmp_path: Path) -> None:
    rows = cells(card(tmp_path, report([32, 32]), [32, 32]).text)
    assert ["sparsity of the blocks, 20.00 % asked", "", "20.33 %"] in rows
    assert ["hidden units of the FFN of a block", "64", "32"] in rows
    assert ["topics (test)", "17.250", "19.500", "× 1.130", "254", "128", "<s>", "another"] in rows
    assert ["calibration text", "mine.txt"] in rows
    assert ["own text of the model among them", "512 tokens, 33.00 % of the weight"] in rows
    assert ["peak memory, process", "1.00 GiB"] in rows


def test_perplexities_of_other_weights_are_no_figures_of_the_model(tmp_path: Path) -> None:
    told = report([32, 32])
    told["saved"]["measured"] = False
    made = card(tmp_path, told, [32, 32])
    assert made.data.eval_results is None
    assert made.data.metrics is None
    assert "These are not figures of the weights in this folder" in made.text


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_perplexity_that_is_no_number_is_not_given_to_the_hub(value: float, tmp_path: Path) -> None:
    told = report([32, 32])
    told["evaluation"][0]["after"]["perplexity"] = value
    made = card(tmp_path, told, [32, 32])
    assert made.data.eval_results is None
    assert f"| {value} |" in made.text


@pytest.mark.parametrize("told", [{}, {"events": []}, {"evaluation": "nonsense"}, {"config": {}, "seconds": {}}])
def test_of_what_is_not_known_nothing_is_said(told: dict[str, Any], tmp_path: Path) -> None:
    text = card(tmp_path, told, [32, 32]).content
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["Use", "What was removed", "Who loads it"]
    assert not re.search(r"None|nan|base_model|license|perplexity", text)


def test_a_report_of_another_pruning_is_not_told(tmp_path: Path) -> None:
    made = card(tmp_path, report([48, 48]), [32, 32])
    assert made.data.eval_results is None
    assert "the report that was saved along is that of another pruning" in made.text
    assert "mine.txt" not in made.text


def test_events_of_a_training_run_are_told(tmp_path: Path) -> None:
    event = {"step": 5, "sparsity": 0.2, "parameters": 830, "perplexity_before": 9.0, "perplexity_pruned": 12.5}
    rows = cells(card(tmp_path, {"events": [{**event, "perplexity_recovered": None}]}, [32, 32]).text)
    assert ["5", "20.00 %", "830", "9.000", "12.500", "–"] in rows


def test_divergences_are_told_of_a_run_with_a_teacher(tmp_path: Path) -> None:
    event = {"step": 5, "sparsity": 0.2, "parameters": 830, "kl_pruned": 0.5, "kl_recovered": 0.25}
    rows = cells(card(tmp_path, {"events": [event]}, [32, 32]).text)
    assert ["5", "20.00 %", "830", "–", "–", "–", "0.500", "0.250"] in rows


def test_accuracies_stand_beside_those_of_another_model_and_the_hub_reads_them(tmp_path: Path) -> None:
    ours, theirs = ({"arc": Answers("acc_norm", "q", correct)} for correct in ([1, 0, 0, 1], [1, 1, 0, 1]))
    entry = entry_of(tiny_model("llama"), ours, Measured("the dense | one", "float32", theirs))
    made = card(tmp_path, report([32, 32], tasks=[entry]), [32, 32])
    rows = cells(made.text)
    assert ["task", "metric", "questions", "accuracy", "of the dense | one", "difference"] in rows
    assert ["arc", "acc_norm", "4", "0.5000 ± 0.2887", "0.7500 ± 0.2500", "-0.2500 ± 0.2500"] in rows
    found = [(one.dataset_name, one.metric_type, one.metric_value) for one in made.data.eval_results]
    assert found == [("topics (test)", "perplexity", 19.5), ("arc", "accuracy", 0.5)]
    assert made.data.metrics == ["perplexity", "accuracy"]


def test_no_name_breaks_the_card(tmp_path: Path) -> None:
    told = report([32, 32])
    told["base"] = {"name": HOSTILE, "license": "My License: #1\nv2"}
    told["evaluation"][0] |= {"name": HOSTILE, "bos": HOSTILE}
    told["calibration"]["name"] = told["config"]["device"] = HOSTILE
    made = card(tmp_path, told, [32, 32])
    assert (made.data.license, made.data.license_name) == ("other", "my-license-1-v2")
    assert made.data.eval_results[0].dataset_name == HOSTILE
    shown = " ".join(HOSTILE.split())
    rows = cells(made.text)
    assert [row[0] for row in rows].count(shown) == 1
    assert ["calibration text", shown] in rows
    assert ["theirs|x", "", "not tried", shown] in rows
    assert "<script>" not in made.text
    assert re.findall("^# .*", made.text, re.MULTILINE)[0].endswith("pruned by 20.33 %")


def test_many_uneven_blocks_are_told_one_by_one(tmp_path: Path) -> None:
    widths = [1 + index % 60 for index in range(126)]
    rows = cells(card(tmp_path, report(widths), widths).text)
    assert ["125", "6", "0.400", "0.100"] in rows
    assert ["hidden units of the FFN of a block", "64", "1 to 60, 29.2 on average"] in rows


def test_the_same_facts_make_the_same_files(tmp_path: Path) -> None:
    names = ("README.md", picture.PICTURE_FILE)
    first, second = ((card(tmp_path, report([32, 48]), [32, 48]), [(tmp_path / name).read_bytes() for name in names])[1]
                     for _ in range(2))  # fmt: skip
    assert first == second


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda _: None)
    assert "![" not in card(tmp_path, report([32, 32]), [32, 32]).text
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("form", ["stock", "compact"])
def test_the_lines_on_a_card_load_the_model(form: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = pruned("llama-gqa", FFN)
    save_pruned(model, tmp_path / "p", tiny_tokenizer, form=form, verify=False)
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "p" / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "p")), found)
    assert found["model"].num_parameters() == model.num_parameters()
    assert len(found["tokenizer"]) == len(tiny_tokenizer)


def test_base_and_license_are_those_of_the_folder_it_was_made_from(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/base"}))
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: org/older\n---\ntext\n")
    model.config._name_or_path = str(tmp_path / "base")
    assert base_of(model, {}) == {"name": "base", "id": "org/base", "license": "mit"}


@pytest.mark.parametrize("name", ["", "nowhere/at/all", "./x", "single"])
def test_what_is_no_repository_is_no_base(name: str) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = name
    assert "id" not in base_of(model, {})


def test_a_model_that_is_pruned_further_has_the_base_of_the_first(tmp_path: Path) -> None:
    model = pruned("llama-gqa", FFN)
    model.fasp_report["base"] = {"name": "org/base", "id": "org/base"}
    save_pruned(model, tmp_path / "p", form="compact", verify=False)
    again = load_pruned(tmp_path / "p")
    from fasp_lightning import FASPPruner

    FASPPruner(basic(0.4, attention="none")).prune(again, [torch.arange(80).reshape(2, 40)])
    save_pruned(again, tmp_path / "q", form="compact", verify=False)
    made = ModelCard.load(tmp_path / "q" / "README.md")
    assert made.data.base_model == "org/base"
    assert "It was pruned in several steps" in made.text
