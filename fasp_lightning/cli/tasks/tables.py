"""Tasks on paper: figures, their means, and the difference to another model."""

from __future__ import annotations

from collections.abc import Mapping

from fasp_lightning.checkpoints.tasks.answers import Answers, Figure, Measured, accuracies, differences
from fasp_lightning.cli.tasks.harness import TaskFigures, TaskResult

Rows = list[tuple[str, ...]]


def task_table(found: TaskFigures, against: Measured | None) -> tuple[tuple[str, ...], Rows]:
    """Columns and rows: the figures of every task, then the means over the tasks.

    Args:
        found: What the model reaches.
        against: Another model's answers to the same questions; its columns are left out without it.
    """
    columns: tuple[str, ...] = ("task", "metric", "value", "std. error", "examples")
    means = {name: figure for name, figure in accuracies(found.answers).items() if name not in found.answers}
    rows: Rows = [(r.task, r.metric, f"{r.value:.4f}", _error(r.error), f"{r.examples:,}") for r in found.results]
    rows += [(name, "", f"{figure.value:.4f}", _error(figure.error), "") for name, figure in means.items()]
    if against is None:
        return columns, rows
    apart = differences(found.answers, against.answers)
    shown = [_of(result, found.answers, apart) for result in found.results] + [apart[name] for name in means]
    added = [("", "") if one is None else (f"{one.value:+.4f}", _error(one.error)) for one in shown]
    return (*columns, f"− {against.model}", "paired error"), [(*a, *b) for a, b in zip(rows, added, strict=True)]


def _of(result: TaskResult, answers: Mapping[str, Answers], apart: Mapping[str, Figure]) -> Figure | None:
    """The difference in the metric that answers are counted by."""
    counted = answers.get(result.task)
    return apart[result.task] if counted is not None and counted.metric == result.metric else None


def _error(error: float) -> str:
    return "" if error != error else f"{error:.4f}"  # NaN differs from itself
