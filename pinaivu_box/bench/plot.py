"""The distributions of first tokens and of gaps as an SVG: no plotting library, one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pinaivu_box.bench.compare import BenchRun
from pinaivu_box.bench.statistics import percentile
from pinaivu_box.bench.target import BenchTarget

WIDTH, HEIGHT = 1000, 440
_TOP, _PLOT_HEIGHT, _PLOT_WIDTH = 80, 280, 400
_LEFTS = (70, 560)
_MAX_POINTS = 400  # of a curve
_COLOURS = ("#0072b2", "#d55e00")  # distinguishable with any colour vision
_DASHES = ("", "7 4")
_TAIL = 0.999  # the axis ends at this percentile, so that an outlier does not compress it


def svg(targets: list[BenchTarget], runs: list[BenchRun]) -> str:
    """An SVG of two panels, with one curve for all runs of a server."""
    panels = (("Time to first token", "ttfts"), ("Gap between tokens", "gaps"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13"'
        ' fill="#222222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_legend(targets),
    ]
    for left, (title, name) in zip(_LEFTS, panels, strict=True):
        values = [
            sorted(1000 * value for run in runs if run.target == n for value in getattr(run, name))
            for n in range(len(targets))
        ]
        parts += _panel(left, title, values)
    return "\n".join([*parts, "</svg>", ""])


def _legend(targets: list[BenchTarget]) -> list[str]:
    parts = []
    for number, target in enumerate(targets):
        y = 20 + 20 * number
        parts += [
            _path([(70, y), (100, y)], number),
            _text(108, y + 4, f"{target.url} · {target.model}", "start"),
        ]
    return parts


def _panel(left: float, title: str, curves: Sequence[Sequence[float]]) -> list[str]:
    """A panel: the cumulative share of values over milliseconds (logarithmic)."""
    middle, bottom = left + _PLOT_WIDTH / 2, _TOP + _PLOT_HEIGHT
    parts = [_text(middle, _TOP - 12, title, "middle", ' font-weight="bold"')]
    if not any(curves):
        return [*parts, _text(middle, _TOP + _PLOT_HEIGHT / 2, "no values", "middle")]
    low, high, ticks = _axis([curve for curve in curves if curve])

    def x(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return left + _PLOT_WIDTH * share

    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - _PLOT_HEIGHT * share
        parts += [_grid(left, y, left + _PLOT_WIDTH, y)]
        parts += [_text(left - 8, y + 4, f"{100 * share:.0f}", "end")]
    for tick in ticks:
        parts += [_grid(x(tick), _TOP, x(tick), bottom)]
        parts += [_text(x(tick), bottom + 20, f"{tick:,.10g}", "middle")]
    parts += [
        _text(middle, bottom + 44, "milliseconds", "middle"),
        f'<text transform="translate({left - 48:g} {_TOP + _PLOT_HEIGHT / 2:g}) rotate(-90)"'
        ' text-anchor="middle">cumulative %</text>',
    ]
    for number, curve in enumerate(curves):
        if curve:
            count = min(_MAX_POINTS, max(2, len(curve)))
            shares = [i / (count - 1) for i in range(count)]
            points = [(x(percentile(curve, s)), bottom - _PLOT_HEIGHT * s) for s in shares]
            parts.append(_path(points, number))
    return parts


def _axis(curves: Sequence[Sequence[float]]) -> tuple[float, float, list[float]]:
    """The ends of the axis and its ticks: 1, 2, 5, 10, … or only powers of ten."""
    low = max(1e-3, min(percentile(curve, 1 - _TAIL) for curve in curves))
    high = max(low * 2, *(percentile(curve, _TAIL) for curve in curves))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0,)):
        marks = [step * 10.0**power for power in powers for step in steps]
        low_mark = max((mark for mark in marks if mark <= low), default=marks[0])
        high_mark = min((mark for mark in marks if mark >= high), default=marks[-1])
        ticks = [mark for mark in marks if low_mark <= mark <= high_mark]
        if len(ticks) <= 9:
            break
    return low_mark, high_mark, ticks


def _path(points: Sequence[tuple[float, float]], number: int) -> str:
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{_DASHES[number]}"' if _DASHES[number] else ""
    return f'<path d="{line}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2"{dash}/>'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
