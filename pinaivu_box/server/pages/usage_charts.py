"""The charts and figures of an overview (`admin.overview`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from markupsafe import Markup

from pinaivu_box.admin.overview import Moment, Overview
from pinaivu_box.admin.usage_report import percentile
from pinaivu_box.amount import UNITS
from pinaivu_box.server.pages.charts import Point, Series, bars, lines
from pinaivu_box.server.pages.filters import compact, iso, milliseconds
from pinaivu_box.store.usage import Sums


class Chart(NamedTuple):
    """`legend` has the names of the series and their colours."""

    title: str
    figure: Markup
    legend: list[tuple[str, str]]


def charts(overview: Overview, currency: str) -> list[Chart]:
    moments = overview.moments
    points = [_point(moment, hourly=overview.hourly) for moment in moments]
    requests = [
        Series("answered", "s1", [moment.sums.requests for moment in moments]),
        Series("errors", "bad", [moment.errors for moment in moments]),
    ]
    tokens = [
        Series(
            "prompt",
            "s2",
            [moment.sums.prompt_tokens - moment.sums.cached_tokens for moment in moments],
        ),
        Series("prompt, cached", "s4", [moment.sums.cached_tokens for moment in moments]),
        Series("completion", "s1", [moment.sums.completion_tokens for moment in moments]),
    ]
    cost = [Series("cost", "s3", [moment.sums.amount / UNITS for moment in moments])]
    first = _percentiles([moment.sums.ttft_ms for moment in moments])
    whole = _percentiles([moment.sums.total_ms for moment in moments])

    def drawn(
        draw: Callable[..., Markup], title: str, series: list[Series], write: Callable[..., str]
    ) -> Chart:
        legend = [(each.name, each.colour) for each in series] if len(series) > 1 else []
        return Chart(title, draw(title, points, series, write), legend)

    shown = [
        drawn(bars, "Requests", requests, compact),
        drawn(bars, "Tokens", tokens, compact),
        drawn(bars, "Cost", cost, lambda value: f"{compact(value)} {currency}"),
    ]
    if any(moment.sums.ttft_ms for moment in moments):
        shown.append(drawn(lines, "Time to first token", first, milliseconds))
    if any(moment.sums.total_ms for moment in moments):
        shown.append(drawn(lines, "Time of the whole answer", whole, milliseconds))
    return shown


def _percentiles(counts: list[Counter[int]]) -> list[Series]:
    return [
        Series(name, colour, [percentile(each, rank) for each in counts])
        for name, colour, rank in (("half within", "s1", 50), ("95 % within", "s3", 95))
    ]


def rows(overview: Overview) -> list[dict[str, Any]]:
    """The figures of the charts as a table, the latest first; moments without any are left out."""
    return [
        {
            "at": moment.at,
            "label": _label(moment, hourly=overview.hourly),
            "sums": moment.sums,
            "errors": moment.errors,
            "times": times_of(moment.sums),
        }
        for moment in reversed(overview.moments)
        if moment.sums.requests or moment.errors
    ]


class Times(NamedTuple):
    """Milliseconds that 50 and 95 of 100 requests took at most, to the first token and in all; None
    where no request has any."""

    first_p50: int | None
    first_p95: int | None
    whole_p50: int | None
    whole_p95: int | None


def times_of(sums: Sums) -> Times:
    return Times(
        *(percentile(counts, rank) for counts in (sums.ttft_ms, sums.total_ms) for rank in (50, 95))
    )


def figures(overview: Overview) -> dict[str, Any]:
    """The sums of all its moments."""
    total = overview.total
    errors = total.errors.total()
    asked = total.requests + errors
    return {
        "requests": total.requests,
        "tokens": total.tokens,
        "prompt_tokens": total.prompt_tokens,
        "cached_percent": round(100 * total.cached_tokens / total.prompt_tokens)
        if total.prompt_tokens
        else None,
        "amount": total.amount,
        "times": times_of(total),
        "errors": errors,
        "error_percent": round(100 * errors / asked, 1) if asked else 0,
        "codes": total.errors.most_common(8),
    }


def _point(moment: Moment, *, hourly: bool) -> Point:
    return Point(_label(moment, hourly=hourly), iso(moment.at) if hourly else "")


def _label(moment: Moment, *, hourly: bool) -> str:
    at = datetime.fromtimestamp(moment.at / 1000, UTC)
    return f"{at:%H:%M} UTC" if hourly else f"{at.day} {at:%b}"
