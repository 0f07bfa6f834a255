"""`pinaivu usage`: the usage of the whole box, from its database."""

from __future__ import annotations

from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import load_config, own_node, with_database
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import UNKNOWN, Column, print_json, print_table

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
    home: Path,
    config: Path | None,
    as_json: bool,
    wide: bool,
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

    currency = load_config(home, config).pricing.currency
    groups = tuple(dict.fromkeys(by)) or (("model",) if as_csv else ())
    first, last = (day and parse_day(day.date().isoformat()) for day in (since, until))

    async def work(database: Any) -> UsageReport:
        return await usage_report(
            database,
            own_node(home),
            currency,
            groups,
            account_id=account and (await accounts.find(database, account)).id,
            key_id=key and (await keys.named(database, key)).id,
            model=model,
            first_day=first,
            last_day=last,
        )

    report = with_database(home, work)
    if as_json:
        print_json(report)
    elif as_csv:
        click.echo(to_csv(report, groups), nl=False)
    else:
        _print(report, groups or ("model",), wide)


def _print(report: Any, by: tuple[str, ...], wide: bool) -> None:
    groups = report.data or report.by_model
    max_tokens = max((group.tokens for group in groups), default=0)
    rows = [
        [
            *labels,
            *_sums(group, group.requests, group.tokens),
            _bar(group.tokens / max_tokens) if max_tokens else "",
        ]
        for labels, group in zip(_labels(groups, by), groups, strict=True)
    ]
    drops = {"": 1, "CACHED": 2, "PROMPT": 3, "COMPLETION": 4, "ERRORS": 5, "TTFT MS": 6,
             "TOTAL MS": 7, "REQUESTS": 8}  # fmt: skip
    numbers = ("REQUESTS", "PROMPT", "CACHED", "COMPLETION", f"COST ({report.currency})",
               "TTFT MS", "TOTAL MS", "ERRORS", "TOKENS")  # fmt: skip
    titles = (*(name.upper() for name in by), *numbers, "")
    columns = [
        Column(title, itemgetter(n), number=title in numbers, drop=drops.get(title))
        for n, title in enumerate(titles)
    ]
    sums = _sums(report, report.total_requests, report.total_tokens)
    total = ["total", *[""] * (len(by) - 1), *sums, ""]
    print_table(rows, columns, wide=wide, total=total if len(groups) > 1 else None)
    if report.more_keys:
        click.echo("only those that used most: --account or --key shows others")
    if report.errors:
        counts = ", ".join(f"{code} {count:,}" for code, count in report.errors.items())
        click.echo(f"errors: {counts}")


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


def _sums(group: Any, requests: int, tokens: int) -> list[str]:
    """The cells of a group, or of the whole report."""
    return [
        f"{requests:,}",
        f"{group.prompt_tokens:,}",
        f"{group.cached_tokens:,}",
        f"{group.completion_tokens:,}",
        group.cost,
        _latency(group.ttft_ms),
        _latency(group.total_ms),
        f"{sum(group.errors.values()):,}",
        f"{tokens:,}",
    ]


def _latency(percentiles: Any) -> str:
    """The median and the 99th percentile."""
    return UNKNOWN if percentiles is None else f"{percentiles.p50:,} / {percentiles.p99:,}"


def _bar(share: float) -> str:
    """In eighths of a character."""
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
