"""The body of `GET /v1/usage`, also what `pinaivu usage` prints: JSON or CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pinaivu_box.amount import to_text
from pinaivu_box.errors import InvalidBody
from pinaivu_box.store.database import Database
from pinaivu_box.store.usage import BYS, By, Labels, Sums, UsageFilter, Who, busiest, usage

DAY_MS = 86_400_000
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Spaces before it do not help, line ends may be dropped, and some take the full-width forms too.
_FORMULA = re.compile(r"\s*[=+@\-\uff1d\uff0b\uff20\uff0d]|[\t\r\n]")
MOST_KEYS = 1000  # or accounts, that a report tells apart
# What is grouped by ids -> where their names stand.
NAMED: dict[By, str] = {
    "account": "account_name", "key": "key_name", "node": "node_name", "peer": "peer_name"
}  # fmt: skip


class Percentiles(Struct, frozen=True):
    """Milliseconds: so long, to within a tenth, took half, nine tenths, 99 hundredths at most."""

    p50: int
    p90: int
    p99: int


class UsageGroup(Struct, frozen=True, omit_defaults=True):
    """`cost` is a decimal number in text, in the report's currency.  `ttft_ms` (to the first token)
    and `total_ms` are of requests that were answered, but not told by the hour; `errors` counts by
    code those that were not.

    Of `day`, `hour`, `account`, `key`, `model`, `node` and `peer` (the box that served it) those
    are there that it was grouped by, and beside each id its name: of a key without one what is
    shown of its secret, of a box what it is called here; "" if nothing is known of it.
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
    """`data` has the groups that were asked for with `group_by`.  With `more_keys` it is only about
    the keys (by account: the accounts) that used most; the sums beside it are of all."""

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


async def report(
    database: Database,
    wanted: UsageFilter,
    by: tuple[By, ...],
    currency: str,
    boxes: Mapping[str, str] | None = None,
) -> UsageReport:
    """`boxes`: what they are called, by node id."""
    groups = models = await usage(database, wanted, ("model",))
    only = None
    who: Who | None = "key" if "key" in by else "account" if "account" in by else None
    if who is not None and wanted.key_id is None:
        only = await busiest(database, wanted, who, MOST_KEYS + 1)
    if by and by != ("model",):
        groups = await usage(database, wanted, by, only and only[:MOST_KEYS])
    names: dict[By, Mapping[str, str]] = {"node": boxes or {}, "peer": boxes or {}}
    for kind in ("key", "account"):
        if kind in by:
            place = by.index(kind)
            names[kind] = await _names(database, kind, {labels[place] for labels in groups})
    more = len(only or ()) > MOST_KEYS
    return await asyncio.to_thread(_made, models, groups, by, names, more, currency)


async def _names(database: Database, kind: Who, ids: set[str]) -> dict[str, str]:
    """Those of keys or accounts, also of such as are revoked or removed."""
    name = "coalesce(nullif(name, ''), prefix || '...' || last_four)" if kind == "key" else "name"
    rows = await database.scan(
        f"SELECT id, {name} FROM {kind}s WHERE id IN (SELECT value FROM json_each(?))",
        (msgspec.json.encode(sorted(ids)).decode(),),
    )
    return {row[0]: row[1] for row in rows}


def _made(
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
    whole = _group(total, (), (), {})
    return UsageReport(
        total_requests=whole.requests,
        total_tokens=whole.tokens,
        prompt_tokens=whole.prompt_tokens,
        cached_tokens=whole.cached_tokens,
        completion_tokens=whole.completion_tokens,
        cost=whole.cost,
        currency=currency,
        ttft_ms=whole.ttft_ms,
        total_ms=whole.total_ms,
        errors=whole.errors,
        by_model=[
            _group(sums, ("model",), labels, {}) for labels, sums in models.items() if labels[0]
        ],
        data=[_group(sums, by, labels, names) for labels, sums in groups.items()] if by else UNSET,
        more_keys=more_keys,
    )


def _group(
    sums: Sums, by: tuple[By, ...], labels: Labels, names: Mapping[By, Mapping[str, str]]
) -> UsageGroup:
    ids = dict(zip(by, labels, strict=True))
    return UsageGroup(
        requests=sums.requests,
        tokens=sums.prompt_tokens + sums.completion_tokens,
        prompt_tokens=sums.prompt_tokens,
        cached_tokens=sums.cached_tokens,
        completion_tokens=sums.completion_tokens,
        cost=to_text(sums.amount),
        ttft_ms=_percentiles(sums.ttft_ms),
        total_ms=_percentiles(sums.total_ms),
        errors=dict(sorted(sums.errors.items())),
        **ids,
        **{field: names[one].get(ids[one], "") for one, field in NAMED.items() if one in ids},
    )


def _percentiles(counts: Counter[int]) -> Percentiles | None:
    """Nearest rank: the smallest bound that so many of a hundred stay within."""
    total, below, found = counts.total(), 0, []
    ranks = [50, 90, 99]
    for bound, count in sorted(counts.items()):
        below += count
        while ranks and below * 100 >= ranks[0] * total:
            found.append(bound)
            ranks.pop(0)
    return Percentiles(*found) if found else None


def grouping(text: str | None) -> tuple[By, ...]:
    """`"day,model"` -> `("day", "model")`.  Raises InvalidBody."""
    asked = [] if text is None else [part.strip() for part in text.split(",")]
    known = {name: name for name in BYS}
    for name in asked:
        if name not in known or asked.count(name) > 1:
            raise InvalidBody(
                f"'{name[:50]}' is not among {', '.join(BYS)}, or is there twice",
                loc=("query", "group_by"),
            )
    return tuple(known[name] for name in asked)  # type: ignore[index]


def parse_day(name: str, text: str | None) -> int | None:
    """`YYYY-MM-DD`, midnight UTC, as Unix milliseconds; None stays None.  Raises InvalidBody."""
    if text is None:
        return None
    try:
        if not _DAY.fullmatch(text):  # strptime takes digits of every script
            raise ValueError
        moment = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidBody(
            f"'{text[:50]}' is not a date: write it as YYYY-MM-DD", loc=("query", name)
        ) from None
    return int(moment.timestamp() * 1000)


def span(first: int | None, last: int | None) -> tuple[int | None, int | None]:
    """From the beginning of a day to the end of another, as `UsageFilter` has it.

    With a first day only it ends now: what lies in the future was written when the clock was ahead,
    and is not of the last days.
    """
    if last is not None:
        return first, last + DAY_MS
    return first, None if first is None else max(first, time.time_ns() // 1_000_000) + 1


def to_csv(made: UsageReport, by: tuple[By, ...]) -> str:
    """RFC 4180: a line for each group, or one for all that was asked.  Names come last."""
    file = io.StringIO()
    lines = csv.writer(file)  # its lines end as the RFC wants

    def write(row: Sequence[str | int]) -> None:
        lines.writerow([cell(value) if isinstance(value, str) else value for value in row])

    sums = ("requests", "tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
    kinds = ("ttft_ms", "total_ms")
    percentiles = [f"{kind}_{p}" for kind in kinds for p in Percentiles.__struct_fields__]
    named = [field for one, field in NAMED.items() if one in by]
    write([*by, *sums, "currency", *percentiles, "errors", *named])
    for group in [_whole(made)] if made.data is UNSET else made.data:
        waits: list[int | str] = []
        for kind in kinds:
            found = getattr(group, kind)
            waits += ["", "", ""] if found is None else msgspec.structs.astuple(found)
        write(
            [
                *(getattr(group, name) for name in by),
                *(getattr(group, name) for name in sums),
                made.currency,
                *waits,
                sum(group.errors.values()),
                *(getattr(group, name) for name in named),
            ]
        )
    return file.getvalue()


def _whole(made: UsageReport) -> UsageGroup:
    same = {
        name: getattr(made, name) for name in UsageGroup.__struct_fields__ if hasattr(made, name)
    }
    return UsageGroup(**same, requests=made.total_requests, tokens=made.total_tokens)


def cell(text: str) -> str:
    """What a spreadsheet would run as a formula stays text, and a number a number."""
    if _NUMBER.fullmatch(text) or not _FORMULA.match(text):
        return text
    return f"'{text}"
