"""`pinaivu audit`: who changed what, when, from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import home_option, json_option, print_json, with_database
from pinaivu_box.cli.tables import print_table, wide_option
from pinaivu_box.errors import UsageError


@click.command()
@home_option
@json_option
@wide_option
@click.option("--since", metavar="TIME", help="A date (UTC), or 2026-11-01T12:00:00Z.")
@click.option(
    "--target", metavar="NAME", help="Only what was done to this key, account or peer; or its id."
)
@click.option(
    "--limit",
    type=click.IntRange(1, 2**62),
    default=100,
    help="Only the newest so many; 100 if not set.",
)
def audit(
    home: Path, as_json: bool, wide: bool, since: str | None, target: str | None, limit: int
) -> None:
    """List the changes of accounts and keys, the newest at the bottom."""
    import msgspec

    from pinaivu_box.ledger.views import called, targets
    from pinaivu_box.store import audit as store
    from pinaivu_box.store.views import AuditEntry, audit_view, parse_time

    try:
        after = 0 if since is None else parse_time(since)
    except ValueError as error:
        raise UsageError(f"--since: {error}.") from error

    async def work(database: Any) -> list[AuditEntry]:
        whose = None if target is None else await targets(database, target)
        found = await store.ls(database, since=after, targets=whose, limit=limit)
        names = await called(database, found)
        return [audit_view(entry, names) for entry in reversed(found)]

    shown = with_database(home, work)
    if as_json:
        print_json(shown)
        return
    rows = [
        (
            e.at[:19].replace("T", " "),
            e.actor_name or e.actor,
            e.source,
            e.action,
            e.target_name or e.target,
            msgspec.json.encode(e.detail).decode(),
        )
        for e in shown
    ]
    print_table(
        ("AT (UTC)", "WHO", "FROM", "ACTION", "TARGET", "DETAIL"),
        rows,
        cut={"DETAIL": "end"},
        spared=("DETAIL", "FROM"),
        wide=wide,
    )
