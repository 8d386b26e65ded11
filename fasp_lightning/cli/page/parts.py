"""What a page is made of, as plain data; the template says how each part looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

from fasp_lightning.checkpoints.facts import finite

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        header: Titles, or none.
        rows: The cells of each row.
        title: What the table shows.
        folded: Shown when the title is clicked, and on paper.
        numbers: Set all columns but the first to the right.
    """

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    numbers: bool = True


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: What it shows.
        svg: The picture, an element ``svg``.
        legend: Number of a color → name, of each series.
    """

    title: str
    svg: Markup
    legend: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Charts:
    """Pictures side by side, as far as there is room."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Note:
    """A sentence; ``warning`` sets it off."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


Part = Table | Charts | Note


@dataclass(frozen=True)
class Section:
    """Parts under a title."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Chapter:
    """Sections about one thing; a page of a single chapter shows its title as the page's."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def number(value: Any, digits: int = 3) -> str:
    """A figure: whole ones with all digits, others with some decimals, and words where there is none."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if finite(value) else str(value)


def percent(value: Any) -> str:
    """``20.31 %`` for 0.2031."""
    return f"{100 * value:.2f} %" if finite(value) else UNKNOWN


def settings_table(settings: dict[str, Any], title: str) -> Table:
    """Nested settings, one a row, those that are null left out."""
    return Table(("setting", "value"), list(_flat(settings, "")), title, folded=True, numbers=False)


def _flat(value: Any, name: str) -> Any:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    elif value is not None:
        yield name, str(value)
