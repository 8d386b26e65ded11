"""``fasp evaluate``: perplexities with what they were measured on, and tasks of the harness."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from fasp_lightning.checkpoints.facts import facts_in
from fasp_lightning.cli.tasks import harness
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


@pytest.mark.parametrize(("name", "words"), [("", "must be a file"), ("a_file/figures.json", "can be written to")])
def test_a_place_for_the_figures_that_is_none_is_refused_first(fasp, tiny_folder, tmp_path, name, words) -> None:
    (tmp_path / "a_file").touch()
    options = ["--evaluation", TEXT, "--output_file", tmp_path / name]
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), *options)
    assert outcome.code == 2
    assert "output_file must" in outcome.err
    assert words in outcome.err
    assert "loading" not in outcome.err + outcome.out


def test_tasks_without_the_harness_name_the_extra(fasp, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
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


def run_tasks(fasp, folder: Path, task_folder: Path, tasks: str, *more: object):
    options = ["--evaluation", "[]", "--tasks", tasks, "--task_folder", task_folder, "--device", "cpu", *more]
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


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three files of questions, in both shapes, one of a task that is reported by likelihood over length."""
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = {
        "arc_challenge": [{"context": f"{c} is", "choices": [" a", " bcde"], "label": 0} for c in "wxyz"],
        "piqa": [{"context": f"{c} is", "choices": [" a", " bcde"], "label": 1} for c in "uvwxyz"],
        "winogrande": [{"contexts": [f"{c} a", f"{c} b"], "continuation": " is", "label": 1} for c in "stuvwxyz"],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Of a continuation, by the model itself."""
    tokens = tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    start = len(tokens) - len(continuation)
    return sum(logits[i - 1, tokens[i]].item() for i in range(start, len(tokens)))


def test_questions_of_a_folder_are_answered_as_the_field_does(
    fasp, tiny_folder, tiny_tokenizer, questions: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    figures = tmp_path / "figures.json"
    outcome = run_tasks(fasp, tiny_folder("llama"), questions, str(questions), "--output_file", figures)
    assert outcome.code == 0
    found, model = json.loads(figures.read_text()), tiny_model("llama")
    a, b = ([likelihood(model, tiny_tokenizer, f"{c} is", text) for c in "uvwxyz"] for text in (" a", " bcde"))
    first, second = (
        [likelihood(model, tiny_tokenizer, f"{c} {text}", " is") for c in "stuvwxyz"] for text in ("a", "b")
    )
    expected = {
        "arc_challenge": ("acc_norm", [x > y / 4 for x, y in zip(a[2:], b[2:], strict=True)]),
        "piqa": ("acc", [x < y for x, y in zip(a, b, strict=True)]),
        "winogrande": ("acc", [x < y for x, y in zip(first, second, strict=True)]),
    }
    for task, (metric, correct) in expected.items():
        given = found["answers"][task]
        assert (given["metric"], given["correct"]) == (metric, "".join(str(int(right)) for right in correct))
        assert re.search(rf"{task}\W+{metric}\W+{sum(correct) / len(correct):.4f}\W", outcome.out)
    mean = sum(sum(correct) / len(correct) for _, correct in expected.values()) / 3
    assert re.search(rf"mean\W+{mean:.4f}\W", outcome.out)


def test_differences_to_another_model_are_of_the_same_questions(
    fasp, tiny_folder, questions: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    run_tasks(fasp, tiny_folder("opt"), questions, str(questions), "--output_file", first)
    folder = tiny_folder("llama")
    more = ["--against", first, "--output_file", second]
    outcome = run_tasks(fasp, folder, questions, str(questions), *more)
    assert outcome.code == 0
    theirs, ours = (json.loads(file.read_text()) for file in (first, second))
    for name, figure in ours["against"]["difference"].items():
        value = ours["accuracy"][name]["value"] - theirs["accuracy"][name]["value"]
        assert figure["value"] == pytest.approx(value)
        assert re.search(rf"{name}\W.*{value:+.4f}".replace("+", r"\+"), outcome.out)
    outcome = run_tasks(fasp, folder, questions, str(questions), "--task_limit", 2, *more)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "against must hold answers to the same questions" in outcome.err


def test_answers_are_kept_in_the_pruned_folder_that_gave_them(
    fasp, prune, tiny_folder, questions: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    prune(tiny_folder("llama"), "--evaluation", "[]")
    figures, folder = tmp_path / "figures.json", tmp_path / "pruned"
    run_tasks(fasp, tiny_folder("llama"), questions, str(questions), "--output_file", figures)
    dense = json.loads(figures.read_text())
    outcome = run_tasks(fasp, folder, questions, str(questions), "--against", figures, "--output_file", figures)
    assert f"recorded in {folder}" in outcome.err
    (found,) = facts_in(folder).tasks
    assert {row.name: row.accuracy._asdict() for row in found.rows} == json.loads(figures.read_text())["accuracy"]
    assert {row.name: row.theirs._asdict() for row in found.rows} == dense["accuracy"]


BAD = {
    "not JSON": ("{", "JSON on each line"),
    "no label": (json.dumps({"context": "a", "choices": [" b", " c"]}), "context, choices and label"),
    "label beyond the choices": (json.dumps({"context": "a", "choices": [" b"], "label": 1}), "index of the right one"),
    "empty": ("", "one or more questions"),
    "no file": (None, "a folder with"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", BAD)
def test_questions_that_are_none_are_refused(fasp, tiny_folder, tmp_path: Path, name: str) -> None:
    pytest.importorskip("lm_eval")
    text, says = BAD[name]
    folder = tmp_path / "bad"
    folder.mkdir()
    if text is not None:
        (folder / "mine.jsonl").write_text(text)
    outcome = run_tasks(fasp, tiny_folder("llama"), folder, str(folder))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert says in outcome.err
