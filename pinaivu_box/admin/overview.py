"""What the dashboard and the page of one's own usage show: sums over time, and who used the most.

All of it comes from sums of hours and days; no request is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pinaivu_box.membership import peer_names
from pinaivu_box.store.database import Database
from pinaivu_box.store.usage import (
    By,
    Sums,
    UsageFilter,
    biggest,
    latencies_by_day,
    latencies_by_hour,
    latencies_of,
    names_of,
    usage,
)

Period = Literal["24h", "7d", "30d"]
PERIODS: tuple[Period, ...] = ("24h", "7d", "30d")
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
_DAYS: dict[Period, int] = {"24h": 1, "7d": 7, "30d": 30}
MAX_SHOWN = 8  # keys, accounts, models, nodes


@dataclass(frozen=True)
class Moment:
    """The sums of an hour or a day that began `at` (Unix milliseconds)."""

    at: int
    sums: Sums

    @property
    def errors(self) -> int:
        return self.sums.errors.total()


@dataclass(frozen=True)
class Part:
    """What a key, an account, a model or a box used.  The times are those of whole days (UTC), also
    of the first one, as they are kept by the day."""

    id: str
    name: str
    sums: Sums


@dataclass(frozen=True)
class Overview:
    """`hourly` says whether the moments are hours; `parts` are in the order of their tokens, the
    most first, and `more` names those lists from which some were left out."""

    period: Period
    hourly: bool
    moments: list[Moment]
    total: Sums
    parts: dict[By, list[Part]] = field(default_factory=dict)
    more: frozenset[By] = frozenset()


def moments_of(period: Period, now: int) -> list[int]:
    """The beginnings of its hours or days, in UTC; the last is the present one."""
    step, count = (HOUR_MS, 24) if period == "24h" else (DAY_MS, _DAYS[period])
    last = now - now % step
    return [last - step * n for n in range(count - 1, -1, -1)]


async def overview(
    database: Database,
    node_id: str,
    period: Period,
    by: tuple[By, ...],
    now: int,
    *,
    account_id: str | None = None,
) -> Overview:
    """Of the whole box, whose id is `node_id`, or of one account."""
    begins = moments_of(period, now)
    hourly = period == "24h"
    selection = UsageFilter(account_id, since=begins[0], until=now + 1)
    moments = await _moments(database, selection, begins, hourly=hourly)
    total = Sums()
    for moment in moments:
        total.add(moment.sums)
    parts: dict[By, list[Part]] = {}
    more: set[By] = set()
    for kind in by:
        found = await _parts(database, selection, kind, node_id)
        parts[kind] = await _timed(database, selection, kind, found[:MAX_SHOWN])
        if len(found) > MAX_SHOWN:
            more.add(kind)
    return Overview(period, hourly, moments, total, parts, frozenset(more))


async def _moments(
    database: Database, selection: UsageFilter, begins: list[int], *, hourly: bool
) -> list[Moment]:
    groups = await usage(database, selection, ("hour" if hourly else "day",), with_latencies=False)
    sums = {_begin(labels[0]): each for labels, each in groups.items()}
    times: dict[int, Sums] = {}
    if not hourly:
        times = await latencies_by_day(database, selection)
    elif selection.account_id is None:
        times = await latencies_by_hour(database, begins[0], begins[-1] + HOUR_MS)
    for at, taken in times.items():
        sums.setdefault(at, Sums()).add(taken)
    return [Moment(at, sums.get(at) or Sums()) for at in begins]


def _begin(label: str) -> int:
    moment = datetime.fromisoformat(label)
    return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1000)


async def _parts(database: Database, selection: UsageFilter, kind: By, node_id: str) -> list[Part]:
    """At most one more than are shown."""
    if kind == "key" or kind == "account":
        found = await biggest(database, selection, kind, MAX_SHOWN + 1)
        names = await names_of(database, kind, {label for label, _ in found})
        return [Part(label, names.get(label, ""), sums) for label, sums in found]
    groups = await usage(database, selection, (kind,), with_latencies=False)
    named: Mapping[str, str] = {}
    if kind == "node":
        named = {**await peer_names.names(database), node_id: "this box"}
    parts = [
        Part(label, named.get(label, "") if kind == "node" else label, sums)
        for (label,), sums in groups.items()
        if label
    ]
    parts.sort(key=lambda part: (-part.sums.tokens, -part.sums.requests, part.name))
    return parts[: MAX_SHOWN + 1]


async def _timed(
    database: Database, selection: UsageFilter, kind: By, parts: list[Part]
) -> list[Part]:
    """The same with the times of their requests."""
    times = await latencies_of(database, selection, kind, [part.id for part in parts])
    for part in parts:
        if (taken := times.get(part.id)) is not None:
            part.sums.add(taken)
    return parts
