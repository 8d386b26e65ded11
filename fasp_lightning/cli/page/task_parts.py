"""What is told of accuracies: of one model, and of several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from fasp_lightning.checkpoints.facts import Facts
from fasp_lightning.checkpoints.tasks.answers import Figure
from fasp_lightning.checkpoints.tasks.entries import TaskFacts, TaskRow
from fasp_lightning.cli.page.charts import Series, dots, plot
from fasp_lightning.cli.page.parts import Charts, Note, Part, Table, number, percent

OURS = "this model"
ERRORS = (
    "After ± stands the standard error over the questions; that of a difference is over the differences question by "
    "question. A mean counts each task alike. acc_norm is accuracy by likelihood over length, as the field reports it."
)


def task_parts(found: TaskFacts) -> list[Part]:
    """Accuracies of one model, beside those of another one where they were measured together."""
    chart = dots("accuracy", {row.name: _dots(row, found.against) for row in found.rows})
    header = ["task", "metric", "questions", "accuracy"]
    header += [] if found.against is None else [f"of {found.against}", "difference"]
    rows = [_row(row) for row in found.rows]
    return [
        Charts([chart] if chart else []),
        Table(header, rows),
        Note(f"Computed in {found.dtype}. {ERRORS}"),
    ]


def _dots(row: TaskRow, against: str | None) -> dict[str, float]:
    theirs = {} if row.theirs is None else {str(against): row.theirs.value}
    return {OURS: row.accuracy.value} | theirs


def _row(row: TaskRow) -> tuple[str, ...]:
    compared = [] if row.theirs is None or row.apart is None else [_whole(row.theirs), _whole(row.apart.signed())]
    questions = "" if row.questions is None else number(row.questions)
    return row.name, row.metric, questions, _whole(row.accuracy), *compared


def _whole(figure: Figure | str) -> str:
    """A figure with its error, which stay on one line."""
    return str(figure).replace(" ", "\u00a0")


def compared_parts(models: Sequence[Facts]) -> list[Part]:
    """Accuracies of several models, in rising sparsity, in what the first of them was asked.

    Args:
        models: What is known of each.
    """
    measured = [found for facts in models for found in facts.tasks]
    if not measured:
        return [Note("Accuracy in tasks: not measured.")]
    first, asked = measured[0].rows, measured[0].questions
    told = [_rows_of(facts, asked) for facts in models]
    cells = [[_cell(rows.get(row.name)) for rows in told] for row in first]
    before = ["not measured" if row.theirs is None else _whole(row.theirs) for row in first]
    rows = [(row.name, *line) for row, *line in zip(first, before, *zip(*cells, strict=True), strict=True)]
    chart = plot("accuracy over sparsity", _curves(models, first, told), "% of the blocks removed", "accuracy")
    return [
        Table(("task", "before", *(percent(facts.asked) for facts in models)), rows),
        Charts([chart] if chart else []),
        Note(f"In brackets the difference to the model before. {ERRORS}"),
    ]


def _rows_of(facts: Facts, asked: dict[str, str]) -> dict[str, TaskRow]:
    """Name → figures of the answers to some questions; none where they were not asked."""
    found = next((found.rows for found in facts.tasks if found.questions == asked), ())
    return {row.name: row for row in found}


def _cell(row: TaskRow | None) -> str:
    if row is None:
        return "not measured"
    return " ".join([_whole(row.accuracy), *([] if row.apart is None else [_whole(f"({row.apart.signed()})")])])


def _curves(models: Sequence[Facts], first: Sequence[TaskRow], told: Sequence[dict[str, TaskRow]]) -> list[Series]:
    """A line for each mean over the tasks, or for the one task there is, from before the pruning on."""
    shown = [row for row in first if row.questions is None] or first[:1]
    curves = []
    for color, row in enumerate(shown):
        points = [(0.0, row.theirs.value)] if row.theirs else []
        for facts, rows in zip(models, told, strict=True):
            sparsity = facts.saved.get("sparsity")
            if sparsity is not None and row.name in rows:
                points.append((100 * sparsity, rows[row.name].accuracy.value))
        curves.append(Series(row.name, points, color=color))
    return curves
