"""`pinaivu usage`: what the whole box has used, from its database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import (
    config_option,
    home_option,
    json_option,
    load_config,
    own_node,
    print_json,
    with_database,
)
from pinaivu_box.cli.tables import print_table, wide_option

_DATE = click.DateTime(["%Y-%m-%d"])
_BY = ("day", "hour", "account", "key", "model", "node", "peer")
_NUMBERS = (
    "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "COST", "TTFT MS", "TOTAL MS", "ERRORS"
)  # fmt: skip
# What a narrower terminal does not show, the first of them first ("" is the bar).
_SPARED = ("", "CACHED", "PROMPT", "COMPLETION", "ERRORS", "TTFT MS", "TOTAL MS", "REQUESTS")

_BAR = 10  # characters


@click.command()
@home_option
@config_option
@json_option
@wide_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a line for each group.")
@click.option("--by", multiple=True, type=click.Choice(_BY), help="Groups; by model if not set.")
@click.option("--since", type=_DATE, help="First day (UTC), for example 2026-11-01.")
@click.option("--until", type=_DATE, help="Last day (UTC), included.")
@click.option("--model", help="Only this model.")
@click.option("--account", metavar="NAME", help="Only this account's keys, by its name or id.")
@click.option("--key", metavar="NAME", help="Only this key, by its name, its id or its beginning.")
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
    """Show requests, tokens, cost, waiting times and errors.

    By account or key it shows their names; by peer, the box that served.
    """
    from pinaivu_box.ledger.views import boxes
    from pinaivu_box.store import accounts, keys
    from pinaivu_box.store.usage import UsageFilter
    from pinaivu_box.store.usage_report import UsageReport, parse_day, report, span, to_csv

    currency = load_config(home, config).pricing.currency
    groups = tuple(dict.fromkeys(by)) or (("model",) if as_csv else ())
    first, last = (day and parse_day("", day.date().isoformat()) for day in (since, until))
    begin, end = span(first, last)

    async def work(database: Any) -> UsageReport:
        wanted = UsageFilter(
            account_id=account and (await accounts.find(database, account)).id,
            key_id=key and (await keys.named(database, key)).id,
            model=model,
            since=begin,
            until=end,
        )
        called = await boxes(database, own_node(home)) if {"node", "peer"} & set(groups) else {}
        return await report(database, wanted, groups, currency, called)

    made = with_database(home, work)
    if as_json:
        print_json(made)
    elif as_csv:
        click.echo(to_csv(made, groups), nl=False)
    else:
        _draw(made, groups or ("model",), wide)


def _draw(made: Any, by: tuple[str, ...], wide: bool) -> None:
    groups = made.data or made.by_model
    most = max((group.tokens for group in groups), default=0)
    labels = _labels(groups, by)
    rows = [[*label, *_numbers(group, most)] for label, group in zip(labels, groups, strict=True)]
    cost = f"COST ({made.currency})"
    numbers = [cost if name == "COST" else name for name in _NUMBERS]
    print_table(
        (*(name.upper() for name in by), *numbers, "TOKENS", ""),
        rows,
        numbers=(*numbers, "TOKENS"),
        spared=_SPARED,
        wide=wide,
        total=["total", *[""] * (len(by) - 1), *_numbers(made, 0)] if len(groups) > 1 else None,
    )
    if made.more_keys:
        click.echo("only those that used most: --account or --key shows others")
    if made.errors:
        told = ", ".join(f"{code} {count:,}" for code, count in made.errors.items())
        click.echo(f"errors: {told}")


def _labels(groups: Any, by: tuple[Any, ...]) -> list[list[str]]:
    """Names in place of ids; of two that are called the same, with the ids."""
    from pinaivu_box.store.usage_report import NAMED

    columns = []
    for one in by:
        ids = [getattr(group, one) for group in groups]
        if (field := NAMED.get(one)) is None:
            columns.append([text or "-" for text in ids])
            continue
        names = [getattr(group, field) for group in groups]
        owners: dict[str, set[str]] = {}
        for name, text in zip(names, ids, strict=True):
            owners.setdefault(name, set()).add(text)
        columns.append([
            (name if len(owners[name]) == 1 else f"{name} ({text})") if name else text[:17] or "-"
            for name, text in zip(names, ids, strict=True)
        ])  # fmt: skip
    return [list(row) for row in zip(*columns, strict=True)]


def _numbers(group: Any, most: int) -> list[str]:
    requests = getattr(group, "requests", None)
    tokens = group.prompt_tokens + group.completion_tokens
    return [
        f"{group.total_requests if requests is None else requests:,}",
        f"{group.prompt_tokens:,}",
        f"{group.cached_tokens:,}",
        f"{group.completion_tokens:,}",
        group.cost,
        _waits(group.ttft_ms),
        _waits(group.total_ms),
        f"{sum(group.errors.values()):,}",
        f"{tokens:,}",
        _bar(tokens / most) if most else "",
    ]


def _waits(found: Any) -> str:
    """The median and the 99th of a hundred."""
    return "-" if found is None else f"{found.p50:,} / {found.p99:,}"


def _bar(share: float) -> str:
    """In eighths of a character."""
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
