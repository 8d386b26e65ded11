"""The rows of :mod:`serve_speed`, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from serve_engines import Ratio

GOAL = 0.9
"""Fraction of the ideal that a row of the default should reach."""


def speed_table(rows: list[dict[str, Any]]) -> str:
    """How many times as fast as dense each model is, beside what its arithmetic allows."""
    head = ["model", "FFN widths", "format"]
    head += [
        f"{phase} × dense" if name == "" else name
        for phase in ("prefill", "decode")
        for name in ("", "ideal", "of ideal")
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["name"], widths_of(row), row["format"]]
        for phase in ("prefill", "decode"):
            cells += phase_cells(row, phase) if phase in row else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def widths_of(row: dict[str, Any]) -> str:
    """The FFN widths of a model, from the smallest to the largest."""
    low, high = min(row["widths"]), max(row["widths"])
    return str(low) if low == high else f"{low} … {high}"


def phase_cells(row: dict[str, Any], phase: str) -> list[str]:
    """Ratio with its range, ideal, and the one over the other, which is marked where a default's row falls short."""
    ratio, ideal = Ratio.of(row[phase]), ideal_of(row, phase)
    reached = ratio.median / ideal
    default = row["kind"] != "dense" and row["multiple"] == "auto"
    mark = "**" if default and round(reached, 2) < GOAL else ""
    return [
        f"{ratio.median:.2f} ({ratio.low:.2f} … {ratio.high:.2f})",
        f"{ideal:.2f}",
        f"{mark}{reached:.2f}{mark}",
    ]


def ideal_of(row: dict[str, Any], phase: str) -> float:
    """FLOPs of dense over pruned for a prompt, bytes of dense over pruned for a token."""
    dense, pruned = row["flops" if phase == "prefill" else "bytes"]
    return dense / pruned


def dense_table(rows: list[dict[str, Any]], prompt: int, tokens: int) -> str:
    """The dense model in each format: tokens a second, and how much of its time shrinks as the arithmetic does."""
    lines = ["| format | prefill tokens/s | goes with FLOPs | decode tokens/s | goes with bytes |", "|---" * 5 + "|"]
    for name in dict.fromkeys(row["format"] for row in rows):
        cells = [name]
        for phase, count in (("prefill", prompt), ("decode", tokens)):
            mine = [row for row in rows if row["format"] == name and phase in row]
            runs = [dense for row in mine for dense, _ in row[phase]]
            cells += (
                [f"{count / statistics.median(runs):.0f}", percent(proportional(mine, phase))] if runs else ["", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def proportional(rows: list[dict[str, Any]], phase: str) -> float | None:
    """Share s of the dense time that shrinks with FLOPs or bytes.

    The line time = 1 - s (1 - work), both as fractions of the dense model's, through the default's pruned models by
    least squares. The rest is what pruning does not touch: attention, norms, the engine's own work.
    """
    pairs = [
        (1 - 1 / ideal_of(row, phase), 1 - 1 / Ratio.of(row[phase]).median)
        for row in rows
        if row["kind"] != "dense" and row["multiple"] == "auto"
    ]
    square = sum(work**2 for work, _ in pairs)
    return sum(work * saved for work, saved in pairs) / square if square else None


def percent(share: float | None) -> str:
    """A share, if there is one."""
    return "" if share is None else f"{100 * share:.0f} %"


def on_front(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether no other file is at most as large with a lower perplexity, or smaller with the same."""
    mine = (row["file"], row["perplexity"])
    others = [(other["file"], other["perplexity"]) for other in rows]
    return not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others)


def size_table(rows: list[dict[str, Any]]) -> str:
    """Size against perplexity, the smallest file first."""
    lines = ["| model | format | MB | perplexity | front |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["file"]):
        mark = "yes" if on_front(row, rows) else ""
        size = f"{row['file'] / 1e6:.1f}"
        lines.append(f"| {row['name']} | {row['format']} | {size} | {row['perplexity']:.2f} | {mark} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over file size: one colour a format, one line a way of pruning, and the front."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for index, name in enumerate(dict.fromkeys(row["format"] for row in rows)):
        for kind, style in (("stock", "-"), ("adaptive", "--")):
            line = [row for row in rows if row["format"] == name and row["kind"] in ("dense", kind)]
            if any(row["kind"] == kind for row in line):
                points = sorted((row["file"] / 1e6, row["perplexity"]) for row in line)
                panel.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=f"C{index}")
        dense = [row for row in rows if row["format"] == name and row["kind"] == "dense"]
        panel.plot([], [], color=f"C{index}", label=name)
        panel.plot([d["file"] / 1e6 for d in dense], [d["perplexity"] for d in dense], "s", color=f"C{index}")
    front = sorted((row["file"] / 1e6, row["perplexity"]) for row in rows if on_front(row, rows))
    panel.step(*zip(*front, strict=True), where="post", color="0.7", linewidth=4, zorder=0, label="front")
    for style, label in (("-", "one FFN width"), ("--", "a width for each block")):
        panel.plot([], [], style, color="0.3", label=label)
    panel.plot([], [], "s", color="0.3", label="dense")
    panel.set(xlabel="file, MB", ylabel="perplexity", yscale="log")
    panel.yaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_minor_formatter("{x:.0f}")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
