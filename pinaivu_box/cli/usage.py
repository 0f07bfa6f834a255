"""`pinaivu usage`: the whole box's usage, from its database."""

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
    print_table,
    with_database,
)

_DAY_MS = 86_400_000
_DATE = click.DateTime(["%Y-%m-%d"])


@click.command()
@home_option
@config_option
@json_option
@click.option("--since", type=_DATE, help="First day (UTC), for example 2026-11-01.")
@click.option("--until", type=_DATE, help="Last day (UTC), included.")
@click.option("--model", help="Only this model.")
def usage(
    home: Path, config: Path | None, as_json: bool, since: Any, until: Any, model: str | None
) -> None:
    """Show requests, tokens and cost by model."""
    from pinaivu_box.store import requests
    from pinaivu_box.store.usage_report import report

    async def work(database: Any) -> list[requests.ModelUsage]:
        return await requests.usage(
            database,
            since=since and _to_ms(since),
            until=until and _to_ms(until) + _DAY_MS,
            model=model,
        )

    rows = with_database(home, work)
    made = report(rows, None, load_config(home, config).pricing.currency)
    if as_json:
        print_json(made)
        return
    columns = ("MODEL", "REQUESTS", "PROMPT", "COMPLETION", "TOKENS", "COST")
    rows_shown = [
        (m.model, m.requests, m.prompt_tokens, m.completion_tokens, m.tokens, m.cost)
        for m in made.by_model
    ]
    total = (made.total_requests, made.prompt_tokens, made.completion_tokens, made.total_tokens)
    rows_shown.append(("total", *total, f"{made.cost} {made.currency}"))
    print_table(
        columns,
        [[f"{n:,}" if isinstance(n, int) else n for n in row] for row in rows_shown],
        numbers=columns[1:],
    )


def _to_ms(day: Any) -> int:
    from datetime import UTC

    return int(day.replace(tzinfo=UTC).timestamp() * 1000)
