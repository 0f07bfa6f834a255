"""Charts: what they show, and that whatever is in them stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from pinaivu_box.server.pages.charts import MAX_POINTS, Point, Series, bars, lines, share
from pinaivu_box.server.pages.filters import amount_short, compact, milliseconds, short_id

Draw = Callable[..., str]
BOTH = pytest.mark.parametrize("draw", [bars, lines])


def drawn(draw: Draw, *values: list[float | None], label: str = "day") -> ElementTree.Element:
    points = [Point(f"{label} {n}") for n in range(len(values[0]))]
    series = [Series(f"series {n}", f"s{n + 1}", each) for n, each in enumerate(values)]
    # As XML: an unescaped character would not be read.
    return ElementTree.fromstring(str(draw("Requests", points, series, compact)))


def shapes(chart: ElementTree.Element, css: str) -> list[ElementTree.Element]:
    return [each for each in chart.iter() if css in each.get("class", "").split()]


@BOTH
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [None, None]])
def test_a_chart_without_values_says_so(draw: Draw, values: list[float | None]) -> None:
    chart = drawn(draw, values)
    assert "Nothing in this time" in chart.get("aria-label", "")
    assert not shapes(chart, "bar-mark")
    assert "Nothing in this time" in "".join(chart.itertext())


def test_a_single_value_is_seen() -> None:
    (bar,) = shapes(drawn(bars, [7.0]), "bar-mark")
    assert float(bar.get("height", "")) > 50
    (dot,) = shapes(drawn(lines, [None, 7.0, None]), "dot-mark")
    assert dot.get("d", "").endswith("h0")


def test_the_smallest_value_beside_the_largest_is_seen() -> None:
    small, large = shapes(drawn(bars, [1.0, 1e15]), "bar-mark")
    assert float(small.get("height", "")) >= 1 and float(large.get("height", "")) < 127


def test_bars_stand_upon_each_other() -> None:
    lower, upper = shapes(drawn(bars, [30.0], [10.0]), "bar-mark")
    assert float(upper.get("y", "")) + float(upper.get("height", "")) == pytest.approx(
        float(lower.get("y", "")), abs=0.02
    )


def test_a_line_has_gaps_where_nothing_is_known() -> None:
    assert len(shapes(drawn(lines, [1.0, 2.0, None, 3.0, 4.0], [None] * 5), "line")) == 2


def test_a_long_series_is_joined_and_loses_nothing() -> None:
    chart = drawn(bars, [1.0] * 10_000)
    told = [title.text or "" for title in chart.iter() if title.tag == "title"]
    assert 0 < len(told) <= MAX_POINTS
    assert sum(int(text.rsplit(" ", 1)[1]) for text in told) == 10_000


@BOTH
def test_labels_and_names_stay_text(draw: Draw) -> None:
    text = '<script>alert("1")</script>&'
    points, series = [Point(text, text)], [Series(text, "s1", [1.0])]
    source = str(draw(text, points, series, compact))
    chart = ElementTree.fromstring(source)
    assert "<script" not in source
    assert text in (chart.get("aria-label") or "")
    assert any(text in (title.text or "") for title in chart.iter() if title.tag == "title")


def test_what_a_column_tells_can_be_written_in_local_time() -> None:
    at = "2026-11-30T13:00:00.000Z"
    chart = bars("Requests", [Point("13:00 UTC", at)], [Series("all", "s1", [2.0])], compact)
    (title,) = ElementTree.fromstring(str(chart)).iter("title")
    assert title.get("data-at") == at
    assert (title.text or "").startswith(title.get("data-label", "nothing"))


@BOTH
def test_a_chart_needs_no_inline_style(draw: Draw) -> None:
    source = str(draw("Requests", [Point("a"), Point("b")], [Series("x", "s1", [1, 2])], compact))
    assert not re.search(r"\sstyle=|<style|\son\w+=", source)


def test_a_share_is_between_nothing_and_all() -> None:
    widths = [re.findall(r'width="([\d.]+%)"', share(part, 10)) for part in (-1, 0, 5, 10, 99)]
    assert [found[1] for found in widths] == ["0.0%", "0.0%", "50.0%", "100.0%", "100.0%"]
    assert 'width="0.0%"' in share(1, 0)


def test_numbers_are_short_and_lose_little() -> None:
    shown = [compact(n) for n in (0, 999, 1_000, 12_345, 999_600, 1_240_000, 5 * 10**9)]
    assert shown == ["0", "999", "1k", "12.3k", "1M", "1.24M", "5B"]
    times = [milliseconds(n) for n in (None, 0, 840, 1_250, 12_400)]
    assert times == ["-", "0 ms", "840 ms", "1.25 s", "12.4 s"]
    # What is not free is never shown as nothing.
    assert [amount_short(n) for n in (0, 1, 10**9 // 3)] == ["0", "0.000000001", "0.3333"]
    assert short_id("req_" + "0" * 26) == "req_000000…000000" and short_id("short") == "short"
