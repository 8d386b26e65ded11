"""Charts as SVG elements; texts go through markupsafe, which escapes them, and colors are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from fasp_lightning.checkpoints.facts import finite
from fasp_lightning.cli.page.parts import Chart

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44
"""Margins of the plot within a picture; so small a picture stays legible on a phone."""

DECADE = 10.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values of one kind.

    Attributes:
        name: Of the legend.
        points: (x, y); those that are not finite are left out.
        shape: ``"line"``, ``"dots"``, or ``"stairs"``: level until the next point.
        color: Number of its color.
    """

    name: str
    points: Sequence[Point]
    shape: Literal["line", "dots", "stairs"] = "line"
    color: int = 0


@dataclass(frozen=True)
class _Axis:
    """Values → places in the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / ((high - low) or 1), 1)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            step = _step((self.high - self.low) / 4)
            found = [step * index for index in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [tick for tick in found if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]


def plot(
    title: str, series: Sequence[Series], x: str, y: str, zero: bool = False, marks: Iterable[float] = ()
) -> Chart | None:
    """Series over numbers.

    Args:
        title: What it shows.
        series: What to draw, the first one at the bottom.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        zero: Let the vertical axis start at 0; otherwise it may be logarithmic.
        marks: Where vertical lines stand.

    Returns:
        The chart, ``None`` if there is nothing to draw.
    """
    shown = [(one, [(a, b) for a, b in one.points if finite(a) and finite(b)]) for one in series]
    shown = [(one, points) for one, points in shown if points]
    if not shown:
        return None
    xs, ys = zip(*(point for _, points in shown for point in points), strict=True)
    across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _vertical(ys, zero)
    lines = [
        Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(across.at(mark), TOP, HEIGHT - BOTTOM)
        for mark in marks
        if across.low <= mark <= across.high
    ]
    drawn = [_shape(one, points, across, up) for one, points in shown]
    inner = Markup("").join([*_axes(across, up, x, y), *lines, *drawn])
    return Chart(title, _svg(title, HEIGHT, inner), {one.color: one.name for one, _ in shown})


def blocks(title: str, named: Mapping[str, Sequence[float | None]], y: str, full: float | None = None) -> Chart | None:
    """A value of each block, as one or more series of stairs that are as wide as the blocks.

    Args:
        title: What it shows.
        named: Name of a series → its value in each block.
        y: Title of the vertical axis.
        full: A value to draw a line at.
    """
    series = [
        Series(
            name,
            [(index + edge, value) for index, value in enumerate(values) if value is not None for edge in (-0.5, 0.5)],
            color=color,
        )
        for color, (name, values) in enumerate(named.items())
    ]
    count = max(map(len, named.values()), default=0)
    if full is not None:
        series.insert(0, Series(f"original, {full:,g}", [(-0.5, full), (count - 0.5, full)], color=9))
    return plot(title, series, "block", y, zero=True)


def bars(title: str, rows: dict[str, float], unit: str) -> Chart | None:
    """A bar for each number, its name and value above it."""
    rows = {name: value for name, value in rows.items() if finite(value) and value >= 0}
    if not rows:
        return None
    axis = _Axis(0, max(rows.values()) or 1, 0, WIDTH)
    inner = [
        Markup(
            '<text x="0" y="{2}">{0}</text><text class="end" x="{3}" y="{2}">{1}</text>'
            '<rect class="c0" x="0" y="{4}" width="{5}" height="8"/>'
        ).format(name, f"{value:,.2f} {unit}", 32 * index + 14, WIDTH, 32 * index + 18, axis.at(value))
        for index, (name, value) in enumerate(rows.items())
    ]
    return Chart(title, _svg(title, 32 * len(rows), Markup("").join(inner)))


def dots(title: str, rows: dict[str, dict[str, float]]) -> Chart | None:
    """Dots on one axis, a line of them for each name, with a color for each kind of value."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    values = [value for row in rows.values() for value in row.values() if finite(value) and value > 0]
    if not values:
        return None
    axis, bottom = _padded(min(values), max(values), 10, WIDTH - 10), 36 * len(rows)
    inner = [_tick(axis, tick, bottom) for tick in axis.ticks()]
    for index, (name, row) in enumerate(rows.items()):
        y = 36 * index + 26
        inner.append(
            Markup('<text x="0" y="{1}">{0}</text><line class="grid" x1="0" x2="{3}" y1="{2}" y2="{2}"/>').format(
                name, y - 12, y, WIDTH
            )
        )
        inner += [
            Markup('<circle class="c{}" cx="{}" cy="{}" r="5"><title>{}: {}</title></circle>').format(
                kinds.index(kind), axis.at(value), y, kind, f"{value:,.3f}"
            )
            for kind, value in row.items()
            if finite(value) and value > 0
        ]
    return Chart(title, _svg(title, bottom + 20, Markup("").join(inner)), dict(enumerate(kinds)))


def _tick(axis: _Axis, tick: float, bottom: float) -> Markup:
    return Markup(
        '<text class="mid" x="{0}" y="{2}">{1}</text><line class="grid" x1="{0}" x2="{0}" y1="0" y2="{3}"/>'
    ).format(axis.at(tick), _short(tick), bottom + 14, bottom)


def _vertical(values: Sequence[float], zero: bool) -> _Axis:
    low, high = min(values), max(values)
    if zero:
        return _Axis(0, high * 1.08 or 1, HEIGHT - BOTTOM, TOP)
    return _padded(low, high, HEIGHT - BOTTOM, TOP)


def _padded(low: float, high: float, start: float, end: float) -> _Axis:
    """With some room at both ends; logarithmic if the values reach that far."""
    if low > 0 and high / low > DECADE:
        return _Axis(low / 1.2, high * 1.2, start, end, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 1
    return _Axis(low - room, high + room, start, end)


def _shape(one: Series, points: list[Point], across: _Axis, up: _Axis) -> Markup:
    places = [(across.at(a), up.at(b)) for a, b in points]
    if one.shape == "dots":
        return Markup("").join(
            Markup('<circle class="c{}" cx="{}" cy="{}" r="4"><title>{}: {} at {}</title></circle>').format(
                one.color, *place, one.name, _short(b), _short(a)
            )
            for place, (a, b) in zip(places, points, strict=True)
        )
    if one.shape == "stairs":
        ends = [x for x, _ in places[1:]] + [across.end]
        places = [corner for (x, y), end in zip(places, ends, strict=True) for corner in ((x, y), (end, y))]
    path = " ".join(f"{x},{y}" for x, y in places)
    return Markup('<polyline class="l{}" points="{}"><title>{}</title></polyline>').format(one.color, path, one.name)


def _axes(across: _Axis, up: _Axis, x: str, y: str) -> Iterable[Markup]:
    floor = HEIGHT - BOTTOM
    for tick in up.ticks():
        yield Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="end" x="{3}" y="{4}">{5}</text>'
        ).format(LEFT, WIDTH - RIGHT, up.at(tick), LEFT - 6, up.at(tick) + 4, _short(tick))
    for tick in across.ticks():
        if float(tick).is_integer():  # steps, blocks and percents
            yield Markup('<text class="mid" x="{}" y="{}">{}</text>').format(across.at(tick), floor + 16, _short(tick))
    yield Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, WIDTH - RIGHT, floor)
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield Markup('<text class="mid name" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 6, x)
    yield Markup('<text class="mid name" transform="translate(14 {}) rotate(-90)">{}</text>').format(floor / 2, y)


def _svg(title: str, height: float, inner: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, title, inner)


def _step(raw: float) -> float:
    """The next round number."""
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _short(value: float) -> str:
    """At most four characters or so."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"
