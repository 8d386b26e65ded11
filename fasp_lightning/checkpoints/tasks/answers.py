"""Answers to questions, their means, and what two models differ by on the same questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.staging import read_json

MEAN = "mean"
CHANCE = "winogrande"
"""The task at which small models guess: where it is among others, a second mean leaves it out."""


class Answers(NamedTuple):
    """What a model answered in one task.

    Attributes:
        metric: What says that an answer is right: ``"acc"``, or ``"acc_norm"`` for likelihood over length.
        questions: What stands for the questions, in their order.
        correct: For each question, 1 for a right answer and 0 for a wrong one.
    """

    metric: str
    questions: str
    correct: list[int]


class Figure(NamedTuple):
    """A mean over questions.

    Attributes:
        value: The mean.
        error: Its standard error; NaN of a single question.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"

    def signed(self) -> str:
        """As a difference."""
        return f"{self.value:+.4f} ± {self.error:.4f}"


class Measured(NamedTuple):
    """A model and its answers.

    Attributes:
        model: Its name.
        dtype: What it computed in.
        answers: Task → answers.
    """

    model: str
    dtype: str
    answers: dict[str, Answers]


def accuracies(answers: Mapping[str, Answers]) -> dict[str, Figure]:
    """Task → accuracy, and last the mean over the tasks, which all count alike."""
    return _figures({task: given.correct for task, given in answers.items()})


def differences(ours: Mapping[str, Answers], theirs: Mapping[str, Answers]) -> dict[str, Figure]:
    """Task → our accuracy − theirs on the same questions, and last the mean over the tasks.

    The error is that of the differences question by question: what is hard for both cancels out.

    Raises:
        FaspError: If ``theirs`` are answers to other questions.
    """
    require_same({task: given.questions for task, given in ours.items()}, theirs)
    return _figures(
        {
            task: [a - b for a, b in zip(given.correct, theirs[task].correct, strict=True)]
            for task, given in ours.items()
        }
    )


def require_same(questions: Mapping[str, str], theirs: Mapping[str, Answers]) -> None:
    """Refuse answers to other questions.

    Raises:
        FaspError: If a task is missing among ``theirs``, or has other questions there.
    """
    other = [task for task, asked in questions.items() if task not in theirs or theirs[task].questions != asked]
    if other:
        raise FaspError(
            f"against must hold answers to the same questions, got none or others in {', '.join(other)}; measure that "
            "model anew with the same tasks and task_limit"
        )


def read_measured(file: str) -> Measured:
    """What an earlier run wrote.

    Raises:
        FaspError: If the file does not hold that.
    """
    path = Path(file)
    if not path.is_file():
        raise FaspError(f"against must be a file that output_file of another run wrote, got {file!r}, which is none")
    with as_refusal(lambda error: FaspError(f"against must be JSON, got {file!r}: {one_line(error)}")):
        found = read_json(path)
    if not isinstance(found, dict) or not found.get("answers"):
        raise FaspError(f"against must hold answers, got {file!r} without; write it by fasp evaluate with tasks")
    return Measured(found["model"], found["dtype"], from_dict(found["answers"]))


def to_dict(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Answers as plain data; those of a task are a string with a digit for each question."""
    return {task: given._asdict() | {"correct": "".join(map(str, given.correct))} for task, given in answers.items()}


def from_dict(data: Mapping[str, Any]) -> dict[str, Answers]:
    """Answers from plain data."""
    return {
        task: Answers(given["metric"], given["questions"], [int(digit) for digit in given["correct"]])
        for task, given in data.items()
    }


def _figures(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    each = {task: _figure(found) for task, found in values.items()}
    rest = [figure for task, figure in each.items() if task != CHANCE]
    means = {MEAN: list(each.values()), f"{MEAN} without {CHANCE}": rest if len(rest) < len(each) else []}
    return each | {name: _mean(figures) for name, figures in means.items() if len(figures) > 1}


def _figure(values: Sequence[float]) -> Figure:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Figure(statistics.fmean(values), error)


def _mean(figures: Sequence[Figure]) -> Figure:
    """The tasks are given and their questions drawn, so only the questions' errors add up."""
    value = statistics.fmean(figure.value for figure in figures)
    return Figure(value, math.sqrt(sum(figure.error**2 for figure in figures)) / len(figures))
