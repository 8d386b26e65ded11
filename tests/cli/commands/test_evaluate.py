"""``fasp evaluate``: perplexities with what they were measured on, and tasks of the harness."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from fasp_lightning.cli import tasks
from fasp_lightning.pruning.perplexity import perplexity
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokens import token_batches

TEXT = "[{source: builtin:topics, seq_len: 16, sequences: 4}, {source: builtin:docstrings, seq_len: 8, sequences: 3}]"


def test_perplexities_with_tokens_and_speed(fasp, tiny_folder, tiny_tokenizer) -> None:
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--evaluation", TEXT)
    assert outcome.code == 0
    for source, seq_len, sequences in (("topics", 16, 4), ("docstrings", 8, 3)):
        text = TextConfig(f"builtin:{source}", split="test", seq_len=seq_len, sequences=sequences)
        value = perplexity(tiny_model("opt"), token_batches(text, tiny_tokenizer))
        row = rf"{source} \(test\)\W+{value:.3f}\W+{sequences * (seq_len - 1)}\W+{seq_len}\W+[\d,]+\W"
        assert re.search(row, outcome.out)


def test_pruned_folder_gives_what_its_report_says(fasp, prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--form", "compact")
    (report,) = json.loads((tmp_path / "pruned" / "fasp_report.json").read_text())["evaluation"]
    options = ["--evaluation", TEXT, "--output_file", tmp_path / "figures.json"]
    assert fasp("evaluate", "--model.name_or_path", tmp_path / "pruned", *options).code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["perplexity"]
    assert figures["topics (test)"]["perplexity"] == pytest.approx(report["after"]["perplexity"], rel=1e-5)


def test_local_text(fasp, tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("all of this text is mine. " * 20)
    source = f"[{{source: {tmp_path}/mine.txt, seq_len: 16, sequences: null}}]"
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--evaluation", source)
    assert re.search(r"mine\.txt .* 480 ", outcome.out)  # 32 sequences


def test_too_short_text_is_refused(fasp, tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("short")
    source = f"[{{source: {tmp_path}/mine.txt, seq_len: 16}}]"
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--evaluation", source)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "is too short" in outcome.err


def test_nothing_to_evaluate_is_refused(fasp, tiny_folder) -> None:
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--evaluation", "[]")
    assert outcome.code == 2
    assert "evaluation must name a text" in outcome.err


def test_tasks_without_the_harness_name_the_extra(fasp, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--tasks", "arc_easy")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "pip install 'fasp-lightning[eval]'" in outcome.err


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task over four local questions, all alike but for one letter."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{letter} is", "choices": ["a", "b"], "answer": 0} for letter in "wxyz"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(
        "task: letters\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def run_tasks(fasp, folder: Path, task_folder: Path, tasks: str):
    options = ["--evaluation", "[]", "--tasks", tasks, "--task_folder", task_folder, "--device", "cpu"]
    return fasp("evaluate", "--model.name_or_path", folder, *options)


def test_accuracy_in_a_task_is_the_models_own(fasp, tiny_folder, tiny_tokenizer, task_folder) -> None:
    pytest.importorskip("lm_eval")
    outcome = run_tasks(fasp, tiny_folder("llama"), task_folder, "letters")
    assert outcome.code == 0
    model = tiny_model("llama")
    right = 0
    for letter in "wxyz":
        context, answers = tiny_tokenizer(f"{letter} is ")["input_ids"], tiny_tokenizer("ab")["input_ids"]
        first, second = model(torch.tensor([context])).logits[0, -1, answers].tolist()
        right += first > second
    assert re.search(rf"letters\W+acc\W+{right / 4:.4f}\W.*\W4\W", outcome.out)


@pytest.mark.usefixtures("no_weights")
def test_unknown_task_is_refused(fasp, tiny_folder, task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    outcome = run_tasks(fasp, tiny_folder("llama"), task_folder, "letters,numbers")
    assert outcome.code == 2
    assert "got numbers" in outcome.err.splitlines()[-1]
