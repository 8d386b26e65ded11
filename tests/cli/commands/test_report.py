"""``fasp report``: the page holds what the folder says, as text, and needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import random_tokens, tiny_model
from tiny_pruning import basic

from fasp_lightning import FASPPruner, save_pruned
from fasp_lightning.checkpoints.tasks.answers import Answers, Measured
from fasp_lightning.checkpoints.tasks.entries import entry_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens")
HOSTILE = '<script>alert(1)</script> | "ü" {{ 7 * 7 }}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama-gqa")
    FASPPruner(basic(sparsity=0.2, attention="value_dims")).prune(model, [random_tokens(2, 12)])
    return save_pruned(model, tmp_path / "pruned", verify=False).path


@pytest.fixture
def page(fasp: Callable, tmp_path: Path) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        output = tmp_path / "page.html"
        outcome = fasp("report", folder, "--output", output, "--overwrite")
        assert outcome.code == 0, outcome.err
        return output.read_text(encoding="utf-8").replace("\u00a0", " ")

    return make


def change(folder: Path, **entries: object) -> None:
    file = folder / "fasp_report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_page_needs_no_other_file_and_names_no_path(page, folder: Path, tmp_path: Path) -> None:
    text = page(folder)
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|<script", text)
    assert str(tmp_path) not in text


def test_page_tells_what_the_report_says_and_what_was_not_measured(page, folder: Path) -> None:
    text, report = page(folder), json.loads((folder / "fasp_report.json").read_text())
    for told in (f"{report['saved']['parameters']:,}", f"{100 * report['sparsity']:.2f} %", "20.00 %"):
        assert told in text
    assert all(f"{pair['error_after']:.3f}" in text for pair in report["pairs"])
    assert "relative error, mean of the outputs" in text
    assert re.search(r"<h2>Perplexity</h2>\s*<p class=\"note\">Not measured", text)


def entry(*correct: int) -> dict[str, Any]:
    """Answers to three questions, beside those of a model that knows two of them."""
    ours, theirs = ({"arc": Answers("acc", "q", list(given))} for given in (correct, (1, 1, 0)))
    return entry_of(tiny_model("llama-gqa"), ours, Measured("dense", "float32", theirs))


def test_accuracies_are_told_with_their_errors_and_paired_differences(page, folder: Path) -> None:
    change(folder, tasks=[entry(1, 0, 0)])
    (row,) = re.findall(r'<tr><th scope="row">arc</th>(.*?)</tr>', page(folder))
    found = re.findall("<td>(.*?)</td>", row)
    assert found == ["acc", "3", "0.3333 ± 0.3333", "0.6667 ± 0.3333", "-0.3333 ± 0.3333"]


def test_sweep_tells_accuracies_side_by_side(page, folder: Path, tmp_path: Path) -> None:
    for name, tasks in {"a": [entry(1, 1, 0)], "b": [entry(0, 0, 0)], "c": []}.items():
        shutil.copytree(folder, tmp_path / "sweep" / name)
        change(tmp_path / "sweep" / name, tasks=tasks)
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    row = re.findall(r'<tr><th scope="row">arc</th>(.*?)</tr>', page(tmp_path / "sweep"))[0]
    before, *found = re.findall("<td>(.*?)</td>", row)
    assert before == "0.6667 ± 0.3333"
    assert found[:2] == ["0.6667 ± 0.3333 (+0.0000 ± 0.0000)", "0.0000 ± 0.0000 (-0.6667 ± 0.3333)"]
    assert found[2] == "not measured"


def test_whatever_is_named_is_shown_as_text(page, folder: Path) -> None:
    change(folder, base={"name": HOSTILE}, warnings=[HOSTILE], exports=[{"target": HOSTILE, "file": HOSTILE}])
    text = page(folder)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; | &#34;ü&#34; {{ 7 * 7 }}") >= 4


def test_bare_report_gives_a_page_that_says_so(page, folder: Path) -> None:
    (folder / "fasp_report.json").write_text("{}")
    text = page(folder)
    assert text.count("ot recorded") > 3
    assert "hidden units of the FFN" in text


def test_run_is_told_from_what_its_logger_wrote(page, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    columns = "step,fasp/seconds,fasp/sparsity,fasp/parameters,fasp/perplexity_before,fasp/perplexity_pruned"
    rows = ["0,1.5,0.1,900,20.25,31.5,", "4,1.5,0.2,800,24.75,41.5,24.75", "8,,,,,,29.125"]
    (run / "metrics.csv").write_text("\n".join([f"{columns},fasp/perplexity_recovered", *rows]))
    text = page(run)
    cells = re.findall(r"<tr><th scope=\"row\">(\d+)</th>(.*?)</tr>", text)
    found = {step: re.findall("<td>(.*?)</td>", row) for step, row in cells}
    assert found["0"][1:7:2] == ["10.00 %", "900", "31.500"]
    assert [found["0"][6], found["4"][6]] == ["24.750", "29.125"]


def test_run_with_a_teacher_tells_divergences_beside_perplexities(page, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    columns = "step,fasp/seconds,fasp/perplexity_pruned,fasp/kl_pruned,fasp/kl_recovered,fasp/kl,train_kl"
    (run / "metrics.csv").write_text(f"{columns}\n0,1.5,31.5,0.75,,,\n1,,,,,,0.5\n2,,,,0.25,0.25,0.375\n")
    text = page(run)
    assert "divergence from the teacher over steps" in text
    (row,) = re.findall(r'<tr><th scope="row">0</th>(.*?)</tr>', text)
    assert re.findall("<td>(.*?)</td>", row)[5:9] == ["31.500", "not measured", "0.750", "0.250"]
    assert {"KL pruned", "KL recovered"} <= set(re.findall('<th scope="col">(.*?)</th>', text))


@pytest.mark.parametrize(
    ("given", "message"),
    [("missing", "folder must be that of"), ("empty", "got none of them"), ("damaged", "must be JSON")],
)
def test_what_no_page_can_be_made_of_is_refused(fasp, folder: Path, tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "fasp_report.json").write_text("{")
    output = tmp_path / "page.html"
    outcome = fasp("report", folder if given == "damaged" else tmp_path / given, "--output", output)
    assert (outcome.code, output.exists()) == (2, False)
    assert message in outcome.err


def test_page_that_is_there_stays_without_overwrite(fasp, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    output.write_text("mine")
    outcome = fasp("report", folder, "--output", output)
    assert outcome.code == 2
    assert "overwrite" in outcome.err
    assert output.read_text() == "mine"
