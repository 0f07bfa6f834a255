"""How pages write sizes and durations, their lists, and what they hand to scripts."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

from pinaivu_box.admin.lists import Page
from pinaivu_box.errors import ApiError, StoreError

_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_DURATIONS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def size(number: float) -> str:
    """Bytes as `1.25 GB`, with three digits that count."""
    for unit, name in _SIZES:
        if number >= unit * 0.9995:
            scaled = number / unit
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """`5 s`, `3 min`, `2 h`."""
    for unit, name in _DURATIONS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def percent(part: float, whole: float) -> float:
    """From 0 to 100."""
    return max(0.0, min(100.0, 100 * part / whole)) if whole else 0.0


def json_text(value: Any) -> str:
    """For an attribute that a script reads."""
    return msgspec.json.encode(value).decode()


def query_of(**parameters: str | int | None) -> str:
    """`?a=1&b=2` of those that are given; "" if none is."""
    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    return f"?{urlencode(given)}" if given else ""


class ShownList(NamedTuple):
    """A page of a list.  `problem`: why there is none for its filters; `older` and `newest` are the
    queries of other pages, "" where there are none."""

    entries: Sequence[Any]
    problem: str
    older: str
    newest: str


async def shown_list(
    listing: Awaitable[Page[Any]], filters: Mapping[str, str], after: str, last: str = "id"
) -> ShownList:
    """The page of a list that comes after the entry `after`; `last` is what an entry is called.

    Its filters may hold a name that is not known, or as a date what is none.
    """
    try:
        page, problem = await listing, ""
    except (ApiError, StoreError) as error:
        page, problem = Page([], has_more=False), error.message
    older = query_of(**filters, after=getattr(page.data[-1], last)) if page.has_more else ""
    newest = query_of(**filters) or "?" if after else ""
    return ShownList(page.data, problem, older, newest)


FUNCTIONS: Mapping[str, Any] = {
    "size": size,
    "duration": duration,
    "percent": percent,
    "json_text": json_text,
}
