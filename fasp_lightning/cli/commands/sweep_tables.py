"""What ``fasp sweep`` prints and writes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.checkpoints.publishing.record import entries_in
from fasp_lightning.checkpoints.tasks.entries import TaskFacts, facts_in_entry
from fasp_lightning.cli.console import megabytes, note, percent, results, table
from fasp_lightning.staging import write_beside


class Finished(NamedTuple):
    """One sparsity that is done.

    Attributes:
        asked: The sparsity asked for.
        folder: Where the model is.
        form: The form it was saved in.
        report: What was saved along.
        weight_bytes: Of the files of weights that the model came in, and of those that were saved.
    """

    asked: float
    folder: Path
    form: str
    report: dict[str, Any]
    weight_bytes: tuple[int, int]


def print_sweep(finished: list[Finished], name: str, folder: Path) -> None:
    """The one table, the continuations of a prompt, and where things are."""
    columns, rows = _table(finished)
    table(f"{name} over sparsities", columns, rows)
    if answered := _task_table(finished):
        table("tasks, and the difference to the model before on the same questions", *answered)
    console = results()
    for one in finished:
        if text := one.report.get("continuation"):
            console.print(f"{percent(one.asked)}: {text['prompt']} … {text['text']}", soft_wrap=True)
    console.print(f"the models, sweep.md and sweep.json are in {folder}", soft_wrap=True)


def write_sweep(finished: list[Finished], folder: Path) -> None:
    """Write sweep.md, sweep.json and, where matplotlib is installed, sweep.png."""
    columns, rows = _table(finished)
    parts = [_markdown(columns, rows)]
    if answered := _task_table(finished):
        parts.append(_markdown(*answered))
    write_beside(folder / "sweep.md", "\n".join(parts).encode())
    data = [
        {
            "asked": one.asked,
            "folder": one.folder.name,
            "form": one.form,
            "weight_bytes": list(one.weight_bytes),
            **one.report,
        }
        for one in finished
    ]
    write_beside(folder / "sweep.json", (json.dumps(data, indent=1) + "\n").encode())
    if not any(one.report["evaluation"] for one in finished):
        return
    if importlib.util.find_spec("matplotlib") is None:
        note("sweep.png needs matplotlib, which is not installed; run pip install 'fasp-lightning[plot]'")
        return
    _draw(finished, folder / "sweep.png")


def _table(finished: list[Finished]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Columns and rows; the first is the model before."""
    if not finished:
        return ("sparsity",), []
    first = finished[0].report
    names = [f"perplexity, {text['name']}" for text in first["evaluation"]]
    columns = ("sparsity", "of the blocks", "of all", "parameters", "on disk", *names, "seconds", "form", "folder")
    before = [f"{text['before']['perplexity']:.3f}" for text in first["evaluation"]]
    sizes = f"{first['parameters_before']:,}", megabytes(finished[0].weight_bytes[0])
    rows: list[Sequence[str]] = [("before", "", "", *sizes, *before, "", "", "")]
    rows += [_row(one) for one in finished]
    return columns, rows


def _markdown(columns: Sequence[str], rows: list[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _task_table(finished: list[Finished]) -> tuple[Sequence[str], list[Sequence[str]]] | None:
    """Columns and rows of the accuracies, if tasks were run: sparsities across, tasks and their means down."""
    found = [_answered(one) for one in finished]
    told = [facts.rows for facts in found if facts is not None]
    if not told or len(told) < len(found):
        return None
    columns = [[str(row.theirs) for row in told[0]]]
    columns += [[f"{row.accuracy} ({row.apart.signed()})" for row in rows if row.apart is not None] for rows in told]
    names = ("task", "before", *(percent(one.asked) for one in finished))
    return names, list(zip([row.name for row in told[0]], *columns, strict=True))


def _answered(one: Finished) -> TaskFacts | None:
    """What the sweep's own questions were answered with; the report may hold answers to others too."""
    asked = one.report["made_with"]["tasks"] or {}
    found = [facts_in_entry(entry) for entry in entries_in(one.report, "tasks")]
    own = (facts for facts in found if facts.against and facts.questions.items() <= asked.items())
    return next(own, None)


def _row(one: Finished) -> Sequence[str]:
    report = one.report
    return (
        percent(one.asked),
        percent(report["sparsity"]),
        percent(report["sparsity_total"]),
        f"{report['parameters_after']:,}",
        megabytes(one.weight_bytes[1]),
        *(f"{text['after']['perplexity']:.3f}" for text in report["evaluation"]),
        f"{report['seconds'].get('total', 0.0):.1f}",
        one.form,
        one.folder.name,
    )


def _draw(finished: list[Finished], path: Path) -> None:
    """Perplexity over removed parameters, one line a text; dashed without restoration, where that was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    removed = [0.0, *(one.report["sparsity_total"] for one in finished)]
    for index, text in enumerate(finished[0].report["evaluation"]):
        texts = [one.report["evaluation"][index] for one in finished]
        before = text["before"]["perplexity"]
        (line,) = axes.plot(
            removed, [before, *(t["after"]["perplexity"] for t in texts)], marker="o", label=text["name"]
        )
        if all(t["unrestored"] for t in texts):
            plain = [before, *(t["unrestored"]["perplexity"] for t in texts)]
            axes.plot(removed, plain, "--", color=line.get_color(), label=f"{text['name']}, nothing restored")
    axes.set(xlabel="fraction of all parameters removed", ylabel="perplexity", yscale="log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
