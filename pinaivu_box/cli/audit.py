"""`pinaivu audit`."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import click
import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import limit_option, standard_options
from pinaivu_box.cli.render import Column, time_text
from pinaivu_box.errors import UsageError


def _detail(entry: Any) -> str:
    return msgspec.json.encode(entry.detail).decode()


_COLUMNS = (
    Column("AT (UTC)", lambda entry: time_text(entry.at, seconds=True)),
    Column("WHO", lambda entry: entry.actor_name or entry.actor),
    Column("FROM", attrgetter("source"), drop=2),
    Column("ACTION", attrgetter("action")),
    Column("TARGET", lambda entry: entry.target_name or entry.target),
    Column("DETAIL", _detail, drop=1, cut="end"),
)


@click.command()
@standard_options(wide=True)
@click.option(
    "--since", metavar="TIME", help="Only since a date or time (UTC): 2026-11-01T12:00:00Z."
)
@click.option(
    "--target", metavar="NAME", help="Only changes of this key, account or peer (name or id)."
)
@limit_option
def audit(call: Call, since: str | None, target: str | None, limit: int) -> None:
    """List the changes of accounts, keys and peers, newest last."""
    from pinaivu_box.admin.lists import list_audit_entries
    from pinaivu_box.admin.views import parse_time

    try:
        start = 0 if since is None else parse_time(since)
    except ValueError as error:
        raise UsageError(f"--since: {error}.") from error
    page = call.in_database(
        lambda database: list_audit_entries(database, since=start, target=target, limit=limit)
    )
    call.print_list(page.data[::-1], _COLUMNS)
