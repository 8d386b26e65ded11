"""Markdown that says what it is given, whatever characters that holds."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_MARKS = re.compile(r"([\\`*_\[\]|~#$!])")


def plain(value: Any) -> str:
    """A value as one line of text, without meaning to Markdown or HTML."""
    return _MARKS.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table.

    Args:
        header: Titles, Markdown.
        rows: Cells, Markdown on one line each.
        numbers: Set all columns but the first to the right.
    """
    ruler = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def folded(title: str, content: str) -> str:
    """A part that opens on a click."""
    return f"<details>\n<summary>{html.escape(title)}</summary>\n\n{content}\n\n</details>"


def percent(value: float) -> str:
    """``20.30 %`` for 0.203."""
    return f"{100 * value:.2f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A figure with some decimals; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)
