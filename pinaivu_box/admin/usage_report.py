"""The report of `GET /v1/usage` and `pinaivu usage`, as JSON or CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pinaivu_box.amount import to_text
from pinaivu_box.membership import peer_names
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms
from pinaivu_box.store.usage import By, Labels, Sums, UsageFilter, Who, busiest, names_of, usage

DAY_MS = 86_400_000
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Spreadsheets skip spaces before it, may drop line ends, and some accept the full-width forms too.
_FORMULA = re.compile(r"\s*[=+@\-\uff1d\uff0b\uff20\uff0d]|[\t\r\n]")
MAX_KEYS = 1000  # or accounts, in a report
# Grouping by ids -> the field with their names.
NAME_FIELDS: dict[By, str] = {
    "account": "account_name", "key": "key_name", "node": "node_name", "peer": "peer_name"
}  # fmt: skip


class Percentiles(Struct, frozen=True):
    """The milliseconds that 50, 90 and 99 of 100 requests took at most, to within a tenth."""

    p50: int
    p90: int
    p99: int


class UsageGroup(Struct, frozen=True, omit_defaults=True):
    """`cost` is decimal text in the report's currency.  `ttft_ms` (time to the first token) and
    `total_ms` are of the requests that were answered, and null if it is grouped by hour; `errors`
    counts the others by code.

    Of `day`, `hour`, `account`, `key`, `model`, `node` and `peer` (the box that served it) those
    are present that it is grouped by, and for each id its name: of a key without a name the
    beginning and the end of its secret, of a box its name here; "" if it is unknown.
    """

    requests: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: str
    ttft_ms: Percentiles | None
    total_ms: Percentiles | None
    errors: dict[str, int]
    day: str | UnsetType = UNSET
    hour: str | UnsetType = UNSET
    account: str | UnsetType = UNSET
    key: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    node: str | UnsetType = UNSET
    peer: str | UnsetType = UNSET
    account_name: str | UnsetType = UNSET
    key_name: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    peer_name: str | UnsetType = UNSET


class UsageReport(Struct, frozen=True, omit_defaults=True):
    """`data` has the groups of `group_by`.  With `more_keys` it has only the keys (or accounts)
    with the most tokens; the sums beside it are of all."""

    total_requests: int
    total_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: str
    currency: str
    ttft_ms: Percentiles | None
    total_ms: Percentiles | None
    errors: dict[str, int]
    by_model: list[UsageGroup]
    data: list[UsageGroup] | UnsetType = UNSET
    more_keys: bool = False
    request_id: str | None = None


async def usage_report(
    database: Database,
    node_id: str,
    currency: str,
    by: tuple[By, ...],
    *,
    account_id: str | None = None,
    key_id: str | None = None,
    model: str | None = None,
    first_day: int | None = None,
    last_day: int | None = None,
) -> UsageReport:
    """The usage of this box, whose node id is `node_id`, grouped `by`.

    The days are midnights in Unix milliseconds; the last is included.
    """
    selection = UsageFilter(account_id, key_id, model, *_span(first_day, last_day))
    groups = models = await usage(database, selection, ("model",))
    only = None
    owner_kind: Who | None = "key" if "key" in by else "account" if "account" in by else None
    if owner_kind is not None and key_id is None:
        only = await busiest(database, selection, owner_kind, MAX_KEYS + 1)
    if by and by != ("model",):
        groups = await usage(database, selection, by, only and only[:MAX_KEYS])
    names: dict[By, Mapping[str, str]] = {}
    if {"node", "peer"} & set(by):
        names["node"] = names["peer"] = {**await peer_names.names(database), node_id: "this box"}
    for kind in ("key", "account"):
        if kind in by:
            position = by.index(kind)
            names[kind] = await names_of(database, kind, {labels[position] for labels in groups})
    more = len(only or ()) > MAX_KEYS
    return await asyncio.to_thread(_report, models, groups, by, names, more, currency)


def _report(
    models: dict[Labels, Sums],
    groups: dict[Labels, Sums],
    by: tuple[By, ...],
    names: Mapping[By, Mapping[str, str]],
    more_keys: bool,
    currency: str,
) -> UsageReport:
    total = Sums()
    for sums in models.values():
        total.add(sums)
    return UsageReport(
        total_requests=total.requests,
        total_tokens=total.tokens,
        currency=currency,
        by_model=[
            _group(sums, ("model",), labels, {}) for labels, sums in models.items() if labels[0]
        ],
        data=[_group(sums, by, labels, names) for labels, sums in groups.items()] if by else UNSET,
        more_keys=more_keys,
        **_sums(total),
    )


def _group(
    sums: Sums, by: tuple[By, ...], labels: Labels, names: Mapping[By, Mapping[str, str]]
) -> UsageGroup:
    fields: dict[str, Any] = dict(zip(by, labels, strict=True))
    for kind, names_by_id in names.items():
        if kind in by:
            fields[NAME_FIELDS[kind]] = names_by_id.get(fields[kind], "")
    return UsageGroup(requests=sums.requests, tokens=sums.tokens, **_sums(sums), **fields)


def _sums(sums: Sums) -> dict[str, Any]:
    """The fields that a group and the whole report have both."""
    return {
        "prompt_tokens": sums.prompt_tokens,
        "cached_tokens": sums.cached_tokens,
        "completion_tokens": sums.completion_tokens,
        "cost": to_text(sums.amount),
        "ttft_ms": _percentiles(sums.ttft_ms),
        "total_ms": _percentiles(sums.total_ms),
        "errors": dict(sorted(sums.errors.items())),
    }


def _percentiles(counts: Counter[int]) -> Percentiles | None:
    known = [value for rank in (50, 90, 99) if (value := percentile(counts, rank)) is not None]
    return Percentiles(*known) if known else None


def percentile(counts: Counter[int], rank: int) -> int | None:
    """By nearest rank: the smallest bound that `rank` of 100 requests stay within; None if there
    are none."""
    total, below = counts.total(), 0
    for bound, count in sorted(counts.items()):
        below += count
        if below * 100 >= rank * total:
            return bound
    return None


def parse_day(text: str) -> int:
    """`YYYY-MM-DD` as the Unix milliseconds of its midnight in UTC.  Raises ValueError."""
    try:
        if not _DAY.fullmatch(text):  # strptime accepts digits of every script
            raise ValueError
        moment = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise ValueError(f"'{text[:50]}' is not a date: write it as YYYY-MM-DD") from None
    return int(moment.timestamp() * 1000)


def _span(first: int | None, last: int | None) -> tuple[int | None, int | None]:
    """The `since` and `until` of a `UsageFilter` from one day to another, which is included.

    Without a last day it ends now: rows of the future were written when the clock was ahead.
    """
    if last is not None:
        return first, last + DAY_MS
    return first, None if first is None else max(first, now_ms()) + 1


def to_csv(report: UsageReport, by: tuple[By, ...]) -> str:
    """RFC 4180: a line for each group, or one for the whole report.  Names come last."""
    file = io.StringIO()
    lines = csv.writer(file)  # ends lines as the RFC requires
    sums = ("requests", "tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
    kinds = ("ttft_ms", "total_ms")
    percentiles = [f"{kind}_{p}" for kind in kinds for p in Percentiles.__struct_fields__]
    named = [field for column, field in NAME_FIELDS.items() if column in by]
    lines.writerow([*by, *sums, "currency", *percentiles, "errors", *named])
    for group in [whole(report)] if report.data is UNSET else report.data:
        values = [getattr(group, name) for name in (*by, *sums)]
        values.append(report.currency)
        for latencies in (group.ttft_ms, group.total_ms):
            values += ["", "", ""] if latencies is None else msgspec.structs.astuple(latencies)
        values += [sum(group.errors.values()), *(getattr(group, name) for name in named)]
        lines.writerow([cell(str(value)) for value in values])
    return file.getvalue()


def whole(report: UsageReport) -> UsageGroup:
    """The sums of the report as one group."""
    shared = set(UsageGroup.__struct_fields__) & set(UsageReport.__struct_fields__)
    values = {name: getattr(report, name) for name in shared}
    return UsageGroup(**values, requests=report.total_requests, tokens=report.total_tokens)


def cell(text: str) -> str:
    """Text that a spreadsheet would run as a formula is quoted; numbers stay numbers."""
    is_formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text
