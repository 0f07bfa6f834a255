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
    print_json,
    with_database,
)

_DATE = click.DateTime(["%Y-%m-%d"])
_BY = ("day", "hour", "key", "model", "node")
_COLUMNS = {
    "REQUESTS": "REQUESTS",
    "PROMPT": "PROMPT",
    "CACHED": "CACHED",
    "COMPLETION": "COMPLETION",
    "COST": "COST",
    "TTFT": "TTFT MS",
    "TOTAL": "TOTAL MS",
    "ERRORS": "ERRORS",
}
# What a narrower terminal does not show, the first of them first.
_SPARED = ("CACHED", "PROMPT", "COMPLETION", "ERRORS", "TTFT", "TOTAL")


@click.command()
@home_option
@config_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a line for each group.")
@click.option("--by", multiple=True, type=click.Choice(_BY), help="Groups; by model if not set.")
@click.option("--since", type=_DATE, help="First day (UTC), for example 2026-11-01.")
@click.option("--until", type=_DATE, help="Last day (UTC), included.")
@click.option("--model", help="Only this model.")
@click.option("--account", metavar="NAME", help="Only this account's keys.")
@click.option("--key", metavar="ID", help="Only this key.")
def usage(
    home: Path,
    config: Path | None,
    as_json: bool,
    as_csv: bool,
    by: tuple[Any, ...],
    since: Any,
    until: Any,
    model: str | None,
    account: str | None,
    key: str | None,
) -> None:
    """Show requests, tokens, cost, waiting times and errors."""
    from pinaivu_box.store import accounts, keys
    from pinaivu_box.store.usage import Wanted
    from pinaivu_box.store.usage_report import UsageReport, parse_day, report, span, to_csv

    currency = load_config(home, config).pricing.currency
    groups = tuple(dict.fromkeys(by)) or (("model",) if as_csv else ())
    first, last = (day and parse_day("", day.date().isoformat()) for day in (since, until))
    begin, end = span(first, last)

    async def work(database: Any) -> UsageReport:
        wanted = Wanted(
            account_id=account and (await accounts.find(database, account)).id,
            key_id=key and (await keys.named(database, key)).id,
            model=model,
            since=begin,
            until=end,
        )
        return await report(database, wanted, groups, currency)

    made = with_database(home, work)
    if as_json:
        print_json(made)
    elif as_csv:
        click.echo(to_csv(made, groups), nl=False)
    else:
        _draw(made, groups or ("model",))


def _draw(made: Any, by: tuple[str, ...]) -> None:
    from rich.console import Console

    console = Console()
    # Into a pipe it is as wide as it needs to be: nothing is cut off there.
    console = console if console.is_terminal else Console(width=1000)
    endless = console.options.update(max_width=100_000)
    for count in range(len(_SPARED) + 1):
        table = _table(made, by, spared=_SPARED[:count])
        if console.measure(table, options=endless).maximum <= console.width:
            break
    console.print(table)
    if made.more_keys:
        console.print("only the keys that used most: --account or --key shows others")
    if made.errors:
        told = ", ".join(f"{code} {count:,}" for code, count in made.errors.items())
        console.print(f"errors: {told}", highlight=False)


def _table(made: Any, by: tuple[str, ...], spared: tuple[str, ...]) -> Any:
    from rich.table import Table

    groups = made.data or made.by_model
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in by:
        table.add_column(name.upper(), no_wrap=True)
    for name, shown in (_COLUMNS | {"COST": f"COST ({made.currency})"}).items():
        if name not in spared:
            table.add_column(shown, justify="right", no_wrap=True)
    table.add_column("TOKENS", no_wrap=True)
    most = max((group.tokens for group in groups), default=0)
    for group in groups:
        labels = [getattr(group, name) or "-" for name in by]
        table.add_row(*labels, *_numbers(group, spared, most))
    if len(groups) > 1:
        table.add_section()
        total = ["total", *[""] * (len(by) - 1)]
        table.add_row(*total, *_numbers(made, spared, 0), style="bold")
    return table


def _numbers(group: Any, spared: tuple[str, ...], most: int) -> list[str]:
    requests = getattr(group, "requests", None)
    tokens = group.prompt_tokens + group.completion_tokens
    cells = {
        "REQUESTS": f"{group.total_requests if requests is None else requests:,}",
        "PROMPT": f"{group.prompt_tokens:,}",
        "CACHED": f"{group.cached_tokens:,}",
        "COMPLETION": f"{group.completion_tokens:,}",
        "COST": group.cost,
        "TTFT": _waits(group.ttft_ms),
        "TOTAL": _waits(group.total_ms),
        "ERRORS": f"{sum(group.errors.values()):,}",
    }
    shown = [cell for name, cell in cells.items() if name not in spared]
    bar = _bar(tokens / most, 6 if spared else 16) if most else ""
    return [*shown, f"{bar} {tokens:,}".strip()]


def _waits(found: Any) -> str:
    """The median and the 99th of a hundred."""
    return "-" if found is None else f"{found.p50:,} / {found.p99:,}"


def _bar(share: float, width: int) -> str:
    """In eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
