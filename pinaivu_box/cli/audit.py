"""`pinaivu audit`: who changed what, when, from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import home_option, json_option, print_json, print_table, with_database
from pinaivu_box.errors import UsageError


@click.command()
@home_option
@json_option
@click.option("--since", metavar="TIME", help="A date (UTC), or 2026-11-01T12:00:00Z.")
@click.option("--target", metavar="ID", help="Only what was done to this key or account.")
@click.option(
    "--limit",
    type=click.IntRange(1, 2**62),
    default=100,
    help="Only the newest so many; 100 if not set.",
)
def audit(home: Path, as_json: bool, since: str | None, target: str | None, limit: int) -> None:
    """List the changes of accounts and keys, the newest at the bottom."""
    import msgspec

    from pinaivu_box.store import audit as store
    from pinaivu_box.store.views import audit_view, parse_time

    try:
        after = 0 if since is None else parse_time(since)
    except ValueError as error:
        raise UsageError(f"--since: {error}.") from error

    async def work(database: Any) -> list[store.Entry]:
        return await store.ls(database, since=after, target=target, limit=limit)

    shown = [audit_view(entry) for entry in reversed(with_database(home, work))]
    if as_json:
        print_json(shown)
        return
    columns = ("AT", "WHO", "FROM", "ACTION", "TARGET", "DETAIL")
    rows = [
        (e.at, e.actor, e.source, e.action, e.target, msgspec.json.encode(e.detail).decode())
        for e in shown
    ]
    print_table(columns, rows)
