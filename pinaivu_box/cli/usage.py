"""`pinaivu usage`: the usage of the whole box, from its database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import UNKNOWN, Column, print_table

_DATE = click.DateTime(["%Y-%m-%d"])
_BY = ("day", "hour", "account", "key", "model", "node", "peer")
_BAR_WIDTH = 10  # characters
_ID_PREFIX = 17  # characters


@click.command()
@standard_options(config=True, wide=True)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, one line for each group.")
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(_BY),
    help="Group by this.  [default: model]  Repeatable.",
)
@click.option(
    "--since", type=_DATE, metavar="DATE", help="First day (UTC), for example 2026-11-01."
)
@click.option("--until", type=_DATE, metavar="DATE", help="Last day (UTC), included.")
@click.option("--model", help="Only this model.")
@click.option("--account", metavar="NAME", help="Only this account (name or id).")
@click.option("--key", metavar="NAME", help="Only this key (name, id or beginning).")
def usage(
    call: Call,
    as_csv: bool,
    by: tuple[Any, ...],
    since: Any,
    until: Any,
    model: str | None,
    account: str | None,
    key: str | None,
) -> None:
    """Show requests, tokens, cost, latencies and errors.

    A peer (or node) is the box that served a request, which may be this one.
    """
    from pinaivu_box.admin.usage_report import UsageReport, parse_day, to_csv, usage_report
    from pinaivu_box.store import accounts, keys

    currency = call.config().pricing.currency
    groups = tuple(dict.fromkeys(by)) or (("model",) if as_csv else ())
    first, last = (day and parse_day(day.date().isoformat()) for day in (since, until))

    async def work(database: Any) -> UsageReport:
        return await usage_report(
            database,
            call.node_id(),
            currency,
            groups,
            account_id=account and (await accounts.find(database, account)).id,
            key_id=key and (await keys.named(database, key)).id,
            model=model,
            first_day=first,
            last_day=last,
        )

    report = call.in_database(work)
    if as_csv and not call.as_json:
        click.echo(to_csv(report, groups), nl=False)
    else:
        call.print(report, lambda report: _print(report, groups or ("model",), call.wide))


class _Row(NamedTuple):
    """A group, or the whole report; `share` is its tokens by those of the largest group."""

    labels: tuple[str, ...]
    group: Any
    share: float = 0.0


def _print(report: Any, by: tuple[str, ...], wide: bool) -> None:
    from pinaivu_box.admin.usage_report import whole

    groups = report.data or report.by_model
    most = max((group.tokens for group in groups), default=0) or 1
    rows = [
        _Row(labels, group, group.tokens / most)
        for labels, group in zip(_labels(groups, by), groups, strict=True)
    ]
    total = _Row(("total", *[""] * (len(by) - 1)), whole(report)) if len(groups) > 1 else None
    print_table(rows, _columns(by, report.currency), wide=wide, total=total)
    if report.more_keys:
        click.echo("only those that used most: --account or --key shows others")
    if report.errors:
        counts = ", ".join(f"{code} {count:,}" for code, count in report.errors.items())
        click.echo(f"errors: {counts}")


def _columns(by: tuple[str, ...], currency: str) -> list[Column]:
    return [
        *(Column(name.upper(), _label_at(n)) for n, name in enumerate(by)),
        Column("REQUESTS", _number("requests"), number=True, drop=8),
        Column("PROMPT", _number("prompt_tokens"), number=True, drop=3),
        Column("CACHED", _number("cached_tokens"), number=True, drop=2),
        Column("COMPLETION", _number("completion_tokens"), number=True, drop=4),
        Column(f"COST ({currency})", lambda row: row.group.cost, number=True),
        Column("TTFT MS", lambda row: _latency(row.group.ttft_ms), number=True, drop=6),
        Column("TOTAL MS", lambda row: _latency(row.group.total_ms), number=True, drop=7),
        Column("ERRORS", lambda row: f"{sum(row.group.errors.values()):,}", number=True, drop=5),
        Column("TOKENS", _number("tokens"), number=True),
        Column("", lambda row: _bar(row.share), drop=1),
    ]


def _label_at(n: int) -> Callable[[_Row], str]:
    return lambda row: row.labels[n]


def _number(field: str) -> Callable[[_Row], str]:
    return lambda row: f"{getattr(row.group, field):,}"


def _labels(groups: Any, by: tuple[Any, ...]) -> list[tuple[str, ...]]:
    """Names instead of ids; if several have the same name, with their ids."""
    from pinaivu_box.admin.usage_report import NAME_FIELDS

    columns = []
    for kind in by:
        ids = [getattr(group, kind) for group in groups]
        if kind not in NAME_FIELDS:
            columns.append([text or UNKNOWN for text in ids])
            continue
        names = [getattr(group, NAME_FIELDS[kind]) for group in groups]
        pairs = list(zip(names, ids, strict=True))
        uses = Counter(name for name, _ in set(pairs))
        columns.append([_label(name, id_, uses[name]) for name, id_ in pairs])
    return list(zip(*columns, strict=True))


def _label(name: str, id_: str, uses: int) -> str:
    """`uses`: how many have that name."""
    if not name:
        return id_[:_ID_PREFIX] or UNKNOWN
    return name if uses == 1 else f"{name} ({id_})"


def _latency(percentiles: Any) -> str:
    """The median and the 99th percentile."""
    return UNKNOWN if percentiles is None else f"{percentiles.p50:,} / {percentiles.p99:,}"


def _bar(share: float) -> str:
    """In eighths of a character."""
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
