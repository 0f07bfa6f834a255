"""Charts as SVG, drawn for any width: shapes are stretched, texts and lines are not.

Colours are classes of the style sheet (`s1` to `s4`, `bad`).  A chart has a title and a description
for whoever does not see it, and each column tells its figures when pointed at; the page shows the
same figures as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

HEIGHT = 150  # pixels, with the labels of the time
_PLOT = 126  # of these, above the labels
_TOP = 14  # above the highest value, for the label of the top line
MAX_POINTS = 240  # further ones are joined
_MAX_LABELS = 5
_BAR = 0.68  # of a column
_STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


class Series(NamedTuple):
    """The values of one colour, one for each point; None where there is none."""

    name: str
    colour: str
    values: Sequence[float | None]


class Point(NamedTuple):
    """A label below the chart, and the moment that it stands for (RFC 3339), if scripts shall write
    it in local time."""

    label: str
    at: str = ""


Write = Callable[[float], str]


def bars(title: str, points: Sequence[Point], series: Sequence[Series], write: Write) -> Markup:
    """The series stacked upon each other."""
    points, series = _joined(points, series, sum)
    sums = [sum(each.values[n] or 0 for each in series) for n in range(len(points))]
    top = _round_up(max(sums, default=0))
    shapes: list[str] = []
    for n in range(len(points)):
        base = 0.0
        for each in series:
            value = each.values[n] or 0
            if value > 0:
                height = max(value / top * (_PLOT - _TOP), 1.0)
                y = _PLOT - base / top * (_PLOT - _TOP) - height
                shapes.append(
                    f'<rect class="bar-mark {each.colour}" x="{n + (1 - _BAR) / 2:.3f}"'
                    f' y="{y:.2f}" width="{_BAR}" height="{height:.2f}"/>'
                )
                base += value
    return _chart(title, points, series, "".join(shapes), top, write, sums)


def lines(title: str, points: Sequence[Point], series: Sequence[Series], write: Write) -> Markup:
    """The series as lines, with gaps where there is no value."""
    points, series = _joined(points, series, max)
    values = [value for each in series for value in each.values if value is not None]
    top = _round_up(max(values, default=0))
    shapes: list[str] = []
    for each in series:
        for run in _runs(each.values):
            places = [(n + 0.5, _PLOT - value / top * (_PLOT - _TOP)) for n, value in run]
            if len(places) == 1:  # a line without length is seen as a dot
                (x, y), path = places[0], "h0"
                shapes.append(_path(f"line dot-mark {each.colour}", f"M{x:.3f} {y:.2f}{path}"))
                continue
            path = "L".join(f"{x:.3f} {y:.2f}" for x, y in places)
            if len(series) == 1:
                closed = f"M{places[0][0]:.3f} {_PLOT}L{path}L{places[-1][0]:.3f} {_PLOT}Z"
                shapes.append(f'<path class="area {each.colour}" d="{closed}"/>')
            shapes.append(_path(f"line {each.colour}", f"M{path}"))
    highest = [
        max((each.values[n] or 0 for each in series), default=0.0) for n in range(len(points))
    ]
    return _chart(title, points, series, "".join(shapes), top, write, highest)


def share(part: float, whole: float, title: str = "") -> Markup:
    """A bar that shows how much of the whole a part is."""
    percent = max(0.0, min(100.0, 100 * part / whole)) if whole > 0 else 0.0
    label = f'role="img" aria-label="{escape(title)}"' if title else 'aria-hidden="true"'
    return Markup(  # noqa: S704
        f'<svg class="share" {label}><rect class="share-ground" width="100%" height="100%" rx="3"/>'
        f'<rect class="share-part" width="{percent:.1f}%" height="100%" rx="3"/></svg>'
    )


def _path(css: str, path: str) -> str:
    return f'<path class="{css}" d="{path}" vector-effect="non-scaling-stroke"/>'


def _chart(
    title: str,
    points: Sequence[Point],
    series: Sequence[Series],
    shapes: str,
    top: float,
    write: Write,
    heights: Sequence[float],
) -> Markup:
    count = max(1, len(points))
    described = _description(points, heights, write)
    columns = "".join(
        f'<rect class="hit" x="{n}" y="0" width="1" height="{_PLOT}">'
        f"<title{_in_local_time(point)}>{escape(_told(point, n, series, write))}</title></rect>"
        for n, point in enumerate(points)
    )
    middle = (_PLOT + _TOP) / 2
    return Markup(  # noqa: S704
        f'<svg class="chart" role="img" width="100%" height="{HEIGHT}"'
        f' aria-label="{escape(title)}. {escape(described)}">'
        f'<line class="grid-line" x1="0" x2="100%" y1="{_TOP}" y2="{_TOP}"/>'
        f'<line class="grid-line" x1="0" x2="100%" y1="{middle:g}" y2="{middle:g}"/>'
        f'<svg width="100%" height="{_PLOT}" viewBox="0 0 {count} {_PLOT}"'
        f' preserveAspectRatio="none">{shapes}{columns}</svg>'
        f'<line class="axis" x1="0" x2="100%" y1="{_PLOT}" y2="{_PLOT}"/>'
        f"{_scale(top, middle, write, heights)}{_labels(points)}</svg>"
    )


def _scale(top: float, middle: float, write: Write, heights: Sequence[float]) -> str:
    if not any(heights):
        return (
            f'<text class="nothing" x="50%" y="{middle:g}" text-anchor="middle">'
            "Nothing in this time</text>"
        )
    return (
        f'<text class="scale" x="0" y="{_TOP - 4}">{escape(write(top))}</text>'
        f'<text class="scale" x="0" y="{middle - 4:g}">{escape(write(top / 2))}</text>'
    )


def _labels(points: Sequence[Point]) -> str:
    """Some labels of the time, each in the middle of its column unless it would leave the chart."""
    count = len(points)
    every = max(1, math.ceil(count / _MAX_LABELS))
    texts = []
    for n in range(0, count, every):
        place = (n + 0.5) / count * 100
        anchor, x = (
            ("start", 0.0) if place < 6 else ("end", 100.0) if place > 94 else ("middle", place)
        )
        at = f' data-at="{escape(points[n].at)}"' if points[n].at else ""
        texts.append(
            f'<text class="when" x="{x:.2f}%" y="{HEIGHT - 6}" text-anchor="{anchor}"{at}>'
            f"{escape(points[n].label)}</text>"
        )
    return "".join(texts)


def _in_local_time(point: Point) -> str:
    """Attributes by which a script replaces the label that a text begins with."""
    return f' data-at="{escape(point.at)}" data-label="{escape(point.label)}"' if point.at else ""


def _told(point: Point, n: int, series: Sequence[Series], write: Write) -> str:
    values = [
        f"{each.name} {'-' if (value := each.values[n]) is None else write(value)}"
        for each in series
    ]
    return f"{point.label}: {', '.join(values)}"


def _description(points: Sequence[Point], heights: Sequence[float], write: Write) -> str:
    if not any(heights):
        return "Nothing in this time."
    most = max(range(len(points)), key=lambda n: heights[n])
    return (
        f"{len(points)} points from {points[0].label} to {points[-1].label}; the most, "
        f"{write(heights[most])}, at {points[most].label}."
    )


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Values that follow each other without a gap, with their places."""
    runs: list[list[tuple[int, float]]] = [[]]
    for n, value in enumerate(values):
        if value is not None:
            runs[-1].append((n, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _joined(
    points: Sequence[Point],
    series: Sequence[Series],
    join: Callable[[list[float]], float],
) -> tuple[Sequence[Point], Sequence[Series]]:
    """At most MAX_POINTS: neighbours become one, under the label of the first."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points, series

    def of(values: Sequence[float | None]) -> list[float | None]:
        groups = [values[n : n + size] for n in range(0, len(values), size)]
        known = [[value for value in group if value is not None] for group in groups]
        return [join(group) if group else None for group in known]

    return points[::size], [each._replace(values=of(each.values)) for each in series]


def _round_up(value: float) -> float:
    """The top of a scale: a number with few digits that is not below the value."""
    if not value > 0 or math.isinf(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _STEPS if step * power >= value * 0.9999)
