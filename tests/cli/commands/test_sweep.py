"""``fasp sweep`` on tiny models."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from fasp_lightning import FASPPruner, load_pruned
from fasp_lightning.cli.commands import prune as prune_module
from fasp_lightning.cli.commands import sweep as sweep_module
from fasp_lightning.pruning import pruner
from fasp_lightning.pruning.perplexity import PerplexityResult


@pytest.fixture
def sweep(fasp, tmp_path: Path) -> Callable:
    """``sweep(folder, …)`` sweeps over 10 and 30 % on small local texts; later options win."""
    small = "seq_len: 16, sequences: 4, batch_size: 2"
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(f"{name} makes this text differ from the other one. " * 40)

    def run(folder: object, *more: object):
        calibration = ["--calibration.source", tmp_path / "calibration.txt", "--calibration.seq_len", 16]
        texts = ["--calibration.sequences", 8, "--evaluation", f"[{{source: {tmp_path}/evaluation.txt, {small}}}]"]
        where = [
            "--output_dir",
            tmp_path / "sweep",
            "--device",
            "cpu",
            "--sparsities",
            "[0.3, 0.1]",
            "--verify",
            "false",
        ]
        return fasp("sweep", "--model.name_or_path", folder, *BASIC, *calibration, *texts, *where, *more)

    return run


@pytest.fixture(autouse=True)
def undrawn_curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own picture, too, is drawn for who asks for ``drawn``."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b""))


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sparsities that are computed from here on."""
    found: list[float] = []
    real = FASPPruner.prune

    def count(self: FASPPruner, *args: object, **kwargs: object) -> object:
        found.append(self.config.sparsity)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FASPPruner, "prune", count)
    return found


def report_of(folder: Path) -> dict:
    return json.loads((folder / "fasp_report.json").read_text())


SHARED = ["--pruning.score", "fisher", "--pruning.own_text", "{tokens: 128, seq_len: 16, cache_dir: null}"]


BASIC = ["--pruning.score", "wanda", "--pruning.own_text", "null"]


@pytest.mark.parametrize("options", [BASIC, SHARED], ids=["plain", "sensitivity and own text"])
def test_each_sparsity_is_what_prune_makes_of_the_dense_model(sweep, fasp, tiny_folder, tmp_path, options) -> None:
    folder = tiny_folder("opt")
    assert sweep(folder, *options).code == 0
    for sparsity in ("0.10", "0.30"):
        alone = ["--calibration.source", tmp_path / "calibration.txt", "--calibration.seq_len", 16, "--device", "cpu"]
        more = ["--calibration.sequences", 8, "--evaluation", "[]", "--output_dir", tmp_path / sparsity]
        fasp("prune", "--model.name_or_path", folder, *alone, *more, "--pruning.sparsity", sparsity, *options)
        ours, theirs = load_pruned(tmp_path / "sweep" / f"sparsity_{sparsity}"), load_pruned(tmp_path / sparsity)
        assert ours.fasp_plan == theirs.fasp_plan
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.usefixtures("drawn")
def test_one_table_is_printed_and_written_with_a_picture(sweep, tiny_folder, tmp_path: Path) -> None:
    out = sweep(tiny_folder("opt")).out
    written = (tmp_path / "sweep" / "sweep.md").read_text()
    data = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["asked"] for row in data] == [0.1, 0.3]
    for row in data:
        report = report_of(tmp_path / "sweep" / row["folder"])
        (text,) = report["evaluation"]
        figures = (
            f"{report['parameters_after']:,}",
            f"{100 * report['sparsity']:.2f} %",
            f"{100 * report['sparsity_total']:.2f} %",
            f"{text['after']['perplexity']:.3f}",
            f"{text['before']['perplexity']:.3f}",
            row["folder"],
        )
        assert all(figure in out and figure in written for figure in figures)
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_note_says_how_to_get_it(sweep, tiny_folder, tmp_path: Path, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    outcome = sweep(tiny_folder("opt"))
    assert outcome.code == 0
    assert "pip install 'fasp-lightning[plot]'" in " ".join(outcome.err.split())
    assert sorted(path.name for path in (tmp_path / "sweep").glob("sweep*")) == ["sweep.json", "sweep.md"]


def test_dense_model_is_loaded_measured_and_prepared_once(sweep, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"load": 0, "dense": 0, "prepare": 0}
    load, measure, prepare = sweep_module.load, sweep_module.measure, pruner.prepare

    def prepared(*args: object, **kwargs: object) -> object:
        calls["prepare"] += 1
        return prepare(*args, **kwargs)

    def counted(*args: object) -> object:
        calls["load"] += 1
        return load(*args)

    def measured(model: object, texts: list, what: str) -> list[PerplexityResult]:
        calls["dense"] += what == "dense"
        return measure(model, texts, what)

    monkeypatch.setattr(sweep_module, "load", counted)
    monkeypatch.setattr(prune_module, "load", counted)
    monkeypatch.setattr(sweep_module, "measure", measured)
    monkeypatch.setattr(pruner, "prepare", prepared)
    assert sweep(tiny_folder("opt")).code == 0
    assert calls == {"load": 1, "dense": 1, "prepare": 1}


def test_killed_sweep_loses_only_the_one_in_work(sweep, tiny_folder, tmp_path: Path, pruned, monkeypatch) -> None:
    folder, real = tiny_folder("opt"), sweep_module.save

    def killed(model: object, tokenizer: object, job: object, setup: object) -> object:
        if pruned == [0.1, 0.3]:
            raise KeyboardInterrupt
        return real(model, tokenizer, job, setup)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "save", killed)
        assert sweep(folder).code == 130
    assert "sparsity_0.10" in (tmp_path / "sweep" / "sweep.md").read_text()
    outcome = sweep(folder)
    assert outcome.code == 0
    assert "1 of 2 are finished" in " ".join(outcome.err.split())
    assert pruned == [0.1, 0.3, 0.3]
    assert re.search(r"sparsity_0\.10[\s\S]*sparsity_0\.30", outcome.out)


def test_further_sparsity_keeps_the_others(sweep, tiny_folder, pruned: list[float]) -> None:
    folder = tiny_folder("opt")
    sweep(folder)
    assert "sparsity_0.20" in sweep(folder, "--sparsities", "[0.1, 0.2]").out
    assert pruned == [0.1, 0.3, 0.2]


def test_tasks_are_answered_before_and_at_each_sparsity(sweep, fasp, tiny_folder, tmp_path: Path, pruned) -> None:
    pytest.importorskip("lm_eval")
    folder, asked = tiny_folder("opt"), tmp_path / "questions"
    asked.mkdir()
    for name in ("piqa", "arc_easy"):
        lines = [{"context": f"{c}{name[0]} is", "choices": [" a", " bcde", " cd"], "label": 1} for c in "stuvwxyz"]
        (asked / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = ["--tasks", asked, "--evaluation", "[]"]
    outcome = sweep(folder, *tasks)
    assert outcome.code == 0
    (entry,) = report_of(tmp_path / "sweep" / "sparsity_0.30")["tasks"]
    answered = {folder: entry["against"], tmp_path / "sweep" / "sparsity_0.30": entry}
    for model, row in answered.items():
        alone = ["--model.name_or_path", model, "--device", "cpu", "--output_file", tmp_path / "alone.json"]
        fasp("evaluate", *alone, *tasks)
        found = json.loads((tmp_path / "alone.json").read_text())
        assert row["answers"] == found["answers"]
        assert f"{found['accuracy']['mean']['value']:.4f} ±" in outcome.out
        assert f"{found['accuracy']['mean']['value']:.4f} ±" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert sweep(folder, *tasks).out == outcome.out  # a folder that was evaluated since
    (asked / "piqa.jsonl").unlink()
    assert "made with other settings (tasks)" in " ".join(sweep(folder, *tasks).err.split())
    assert pruned == [0.1, 0.3]


CHANGES = {
    "pruning": ["--pruning.damping", 0.3],
    "calibration": ["--calibration.sequences", 6],
    "evaluation": ["--evaluation", "[]"],
    "form": ["--form", "compact"],
    "compare_unrestored": ["--compare_unrestored", "false"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_models_of_other_settings_are_refused(sweep, tiny_folder, pruned: list[float], name: str) -> None:
    folder, one = tiny_folder("opt"), ["--sparsities", "[0.1]"]
    sweep(folder, *one)
    outcome = sweep(folder, *one, *CHANGES[name])
    assert outcome.code == 2
    assert name in re.search(r"made with other settings \((.*?)\)", outcome.err).group(1)
    assert pruned == [0.1]


def test_overwrite_replaces_models_of_other_settings_once(sweep, tiny_folder, pruned: list[float]) -> None:
    folder, changed = tiny_folder("opt"), ["--sparsities", "[0.1]", *CHANGES["pruning"], "--overwrite"]
    sweep(folder, "--sparsities", "[0.1]")
    assert [sweep(folder, *changed).code for _ in range(2)] == [0, 0]
    assert pruned == [0.1, 0.1]


def test_another_model_of_the_same_name_is_noticed(sweep, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("opt")
    sweep(folder)
    tiny_model("opt", seed=1).save_pretrained(folder)
    outcome = sweep(folder)
    assert outcome.code == 2
    assert "made with other settings (model)" in outcome.err


def test_model_of_another_command_is_refused(sweep, prune, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("opt")
    prune(folder, "--output_dir", tmp_path / "sweep" / "sparsity_0.10")
    assert "sparsity_0.10 was made with other settings" in sweep(folder).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsities", "[]"], r"sparsities must be one or more different numbers, got \[\]"),
        (["--sparsities", "[0.1, 0.1]"], r"different numbers, got \[0\.1, 0\.1\]"),
        (["--sparsities", "[0.1, 1.3]"], r"sparsities must be in \(0, 1\), got 1\.3"),
        (["--sparsities", "[0.1, 0.97]"], r"sparsity must be at most 0\.\d+ .*, got 0\.97"),
        (["--output_dir", "null"], "output_dir must be a folder for a sweep, got null"),
        (["--form", "stock", "--pruning.attention", "value_dims"], "form 'stock' cannot"),
    ],
)
def test_mistake_is_refused_before_the_weights_are_read(sweep, tiny_folder, no_weights, options, message) -> None:
    outcome = sweep(tiny_folder("opt"), *options)
    assert outcome.code == 2
    assert re.search(message, outcome.err)


def test_taken_folder_is_refused_before_the_weights_are_read(sweep, tiny_folder, no_weights, tmp_path: Path) -> None:
    taken = tmp_path / "sweep" / "sparsity_0.30"
    taken.mkdir(parents=True)
    (taken / "thesis.txt").write_text("mine")
    outcome = sweep(tiny_folder("opt"), "--overwrite")
    assert (outcome.code, "holds no pruned model" in outcome.err) == (2, True)
    assert (taken / "thesis.txt").read_text() == "mine"


def test_prompt_is_continued_at_each_sparsity(sweep, tiny_folder) -> None:
    out = sweep(tiny_folder("opt"), "--prompt", "Hello", "--new_tokens", 4).out
    assert re.search(r"10\.00 %: Hello … .*\n30\.00 %: Hello … ", out)


def test_folders_of_near_sparsities_differ(sweep, tiny_folder, tmp_path: Path) -> None:
    sweep(tiny_folder("opt"), "--sparsities", "[0.3, 0.304]", "--evaluation", "[]")
    assert [path.name for path in sorted((tmp_path / "sweep").iterdir()) if path.is_dir()] == [
        "sparsity_0.30",
        "sparsity_0.304",
    ]
