"""The rows of :mod:`quality`, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.checkpoints.tasks.answers import accuracies, differences, from_dict

REFERENCE = "paper"
"""The method that the others' damage is divided by."""

UNRESTORED = "-no-restoration"
"""What the name of a method ends in that is another one without least squares."""

CEILING = 8.0
"""Highest perplexity in the picture, times the dense one; lines that leave it are ruins."""


class Cell(NamedTuple):
    """One finished cell.

    Attributes:
        method: Its name, ``"dense"`` among them.
        sparsity: The one asked for; ``None`` for a saved model.
        seed: Of the calibration windows; ``None`` for a saved model.
        result: What :func:`quality.measure` gave.
    """

    method: str
    sparsity: float | None
    seed: int | None
    result: dict[str, Any]


class Spread(NamedTuple):
    """Mean and range over seeds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} … {self.high:.4g})"


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and range; nothing of nothing."""
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None


def rows_of(cells: list[Cell], dense: dict[str, float]) -> list[dict[str, Any]]:
    """One row a method and sparsity, over its seeds.

    Damage is perplexity − dense perplexity; its ratio is to the reference method at the same sparsity and seed.

    Args:
        cells: All that is there.
        dense: Text → perplexity of the dense model.
    """
    reference = {(c.sparsity, c.seed): c.result["perplexity"] for c in cells if c.method == REFERENCE}
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.sparsity), []).append(cell)
    rows = []
    for (method, sparsity), group in groups.items():
        row: dict[str, Any] = {"method": method, "sparsity": sparsity, "seeds": [cell.seed for cell in group]}
        for name in ("removed_blocks", "removed_all", "calibration_tokens", "own_tokens", "seconds"):
            row[name] = statistics.fmean(cell.result[name] for cell in group)
        row["texts"] = {text: _figures(text, group, dense[text], reference) for text in dense}
        rows.append(row)
    return rows


def _figures(text: str, group: list[Cell], dense: float, reference: dict[Any, dict[str, float]]) -> dict[str, Any]:
    found = [cell.result["perplexity"][text] for cell in group]
    ratios = [
        (cell.result["perplexity"][text] - dense) / (reference[cell.sparsity, cell.seed][text] - dense)
        for cell in group
        if (cell.sparsity, cell.seed) in reference
    ]
    return {
        "perplexity": spread(found),
        "damage": spread([value - dense for value in found]),
        "ratio": spread(ratios),
    }


def markdown(rows: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """The table: mean, and the range over seeds in brackets."""
    columns = ["method", "removed of blocks (of all)", "tokens", "seconds", "seeds"]
    for text in dense:
        columns += [f"{text}", "damage", f"of {REFERENCE}'s"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cells = ["dense", "0 (0)", "", "", ""] + [cell for value in dense.values() for cell in (f"{value:.2f}", "0", "")]
    lines.append(f"| {' | '.join(cells)} |")
    for row in sorted(rows, key=lambda row: row["sparsity"]):
        own = f" + {row['own_tokens']:.0f} own" if row["own_tokens"] else ""
        cells = [
            row["method"],
            f"{row['removed_blocks']:.4f} ({row['removed_all']:.4f})",
            f"{row['calibration_tokens']:.0f}{own}",
            f"{row['seconds']:.0f}",
            ", ".join(map(str, row["seeds"])),
        ]
        for figures in row["texts"].values():
            cells += [str(figures[name]) if figures[name] else "" for name in ("perplexity", "damage", "ratio")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_markdown(cells: list[Cell], dense: dict[str, Any]) -> str:
    """Perplexities and accuracies of each cell, with the differences to the dense model on the same questions.

    Args:
        cells: All that is there.
        dense: What the dense model gave.
    """
    answers = from_dict(dense.get("answers", {}))
    head = ["method", "asked", "removed of all", "seed", *dense["perplexity"]]
    for name in accuracies(answers):
        head += [name] if name in answers else [name, f"{name} − dense"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell in [Cell("dense", None, None, {"removed_all": 0.0, **dense}), *cells]:
        lines.append(f"| {' | '.join(_task_row(cell, dense))} |")
    notes = [
        "± is one standard error; of a difference, over the same questions. A mean counts each task alike.",
        *_restoring(cells),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(f"* {note}" for note in notes)


def _task_row(cell: Cell, dense: dict[str, Any]) -> list[str]:
    found = from_dict(cell.result.get("answers", {}))
    apart = differences(found, from_dict(dense["answers"])) if found else {}
    row = [cell.method, "" if cell.sparsity is None else f"{cell.sparsity:g}", f"{cell.result['removed_all']:.4f}"]
    row += ["" if cell.seed is None else str(cell.seed), *(f"{p:.2f}" for p in cell.result["perplexity"].values())]
    for name, figure in accuracies(found).items():
        row += [str(figure)] if name in found else [str(figure), "" if cell.method == "dense" else apart[name].signed()]
    return row


def _restoring(cells: list[Cell]) -> list[str]:
    """What least squares change, where a method is there without them too."""
    found = {(cell.method, cell.sparsity, cell.seed): cell.result.get("answers") for cell in cells}
    lines = []
    for (method, sparsity, seed), ours in found.items():
        theirs = found.get((f"{method}{UNRESTORED}", sparsity, seed))
        if ours and theirs:
            apart = differences(from_dict(ours), from_dict(theirs))
            means = ", ".join(f"{name} {figure.signed()}" for name, figure in apart.items() if name not in ours)
            lines.append(f"least squares of {method} at {sparsity:g} (seed {seed}), against the same without: {means}")
    return lines


def picture(rows: list[dict[str, Any]], dense: dict[str, float], path: Path) -> None:
    """Perplexity over removed parameters: one line a method, one panel a text; bars are the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(dense), figsize=(5.5 * len(dense), 5), squeeze=False, layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for panel, (text, value) in zip(panels[0], dense.items(), strict=True):
        highest = value
        for method in methods:
            line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["removed_all"])
            points = [(row["removed_all"], row["texts"][text]["perplexity"]) for row in line]
            xs, ys = [0.0, *(x for x, _ in points)], [value, *(y.mean for _, y in points)]
            bars = [[0.0, *(y.mean - y.low for _, y in points)], [0.0, *(y.high - y.mean for _, y in points)]]
            panel.errorbar(xs, ys, yerr=bars, marker="o", markersize=4, capsize=3, label=method)
            highest = max([highest, *(y for y in ys if y < CEILING * value)])
        panel.set(yscale="log", title=text, xlabel="fraction of all parameters removed", ylabel="perplexity")
        panel.set_ylim(0.95 * value, 1.15 * highest)
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
