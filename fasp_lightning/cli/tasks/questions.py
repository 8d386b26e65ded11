"""Questions in local files as tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspFileNotFoundError

Question = dict[str, Any]

NORMALISED = ("arc_challenge", "hellaswag", "openbookqa")
"""Tasks of which the field reports the likelihood over the length of a choice."""

_CHOICES = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "label"}
_CONTEXTS = {"doc_to_text": "label", "doc_to_choice": "contexts", "doc_to_target": "continuation"}


def metric_of(task: str) -> str:
    """The accuracy that the field reports of a task."""
    return "acc_norm" if task in NORMALISED else "acc"


def configs_in(folder: Path) -> list[dict[str, Any]]:
    """The harness' config of each ``*.jsonl`` in a folder, named by its file.

    A line is a question, in one of two shapes: ``{"context": str, "choices": [str, …], "label": int}``, where the
    choices continue the context, or ``{"contexts": [str, …], "continuation": str, "label": int}``, where the contexts
    compete for one continuation. All lines of a file have the same.

    Raises:
        FaspError: If there is no such file, or a line is none of these.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FaspFileNotFoundError(f"tasks must name a folder with *.jsonl, got {str(folder)!r} without one")
    return [_config(file) for file in files]


def _config(file: Path) -> dict[str, Any]:
    lines = file.read_text(encoding="utf-8").splitlines()
    questions = [_question(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions or any(set(question) != set(questions[0]) for question in questions):
        raise FaspError(f"tasks must have one or more questions in a file, all in one shape, got {str(file)!r}")
    spaced = all(text.startswith(" ") for question in questions for text in _continuations(question))

    def dataset(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list([_unspaced(q) for q in questions] if spaced else questions)}

    return {
        "task": file.stem,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        # the space between is the harness' own, so that it does not count in the length of a choice
        "target_delimiter": " " if spaced else "",
        "metric_list": [{"metric": metric_of(file.stem), "aggregation": "mean", "higher_is_better": True}],
        **(_CHOICES if "choices" in questions[0] else _CONTEXTS),
    }


def _question(line: str, place: str) -> Question:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FaspError(f"tasks must have a question in JSON on each line, got {place}: {error}") from error
    shapes = ({"context": str, "choices": list, "label": int}, {"contexts": list, "continuation": str, "label": int})
    for shape in shapes:
        if isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in shape.items()):
            question = {name: found[name] for name in shape}
            if _valid(question):
                return question
    raise FaspError(
        "tasks must have context, choices and label, or contexts, continuation and label in each question, the label "
        f"the index of the right one, got {place}: {line[:80]}"
    )


def _valid(question: Question) -> bool:
    options: list[Any] = question["choices" if "choices" in question else "contexts"]
    texts = [*options, question.get("context", "c"), question.get("continuation", "c")]
    return 0 <= question["label"] < len(options) and all(isinstance(text, str) and text.strip() for text in texts)


def _continuations(question: Question) -> list[str]:
    return question["choices"] if "choices" in question else [question["continuation"]]


def _unspaced(question: Question) -> Question:
    if "choices" in question:
        return question | {"choices": [choice[1:] for choice in question["choices"]]}
    return question | {"continuation": question["continuation"][1:]}
