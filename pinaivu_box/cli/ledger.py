"""`pinaivu ledger`: what peers owe this box, and what it owes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import (
    actor,
    ask_running,
    config_option,
    home_option,
    json_option,
    load_config,
    own_node,
    print_json,
    short_time,
    with_database,
)
from pinaivu_box.cli.tables import print_table, wide_option

_SETTLE_SECONDS = 330.0


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
@home_option
@config_option
@json_option
@wide_option
def ledger(
    context: click.Context, home: Path, config: Path | None, as_json: bool, wide: bool
) -> None:
    """Show what each peer owes this box (below 0: what this box owes it).

    What this box pays for is under THEY SERVED; it owes at most MAX DEBT ([peering] max_debt).
    """
    if context.invoked_subcommand is not None:
        return
    from pinaivu_box.ledger.views import all_balances

    peering = load_config(home, config).peering
    found = with_database(home, lambda database: all_balances(database, peering))
    if as_json:
        print_json(found)
        return
    columns = ("PEER", "CURRENCY", "WE SERVED", "THEY SERVED", "SETTLED", "BALANCE",
               "UNACCEPTED", "LIMIT", "MAX DEBT")  # fmt: skip
    rows = [
        (
            one.name,
            one.currency,
            one.served,
            one.received,
            f"{one.settled_served} / {one.settled_received}",
            one.balance,
            one.waiting,
            one.credit_limit or "-",
            one.max_debt or "-",
        )
        for one in found
    ]
    print_table(
        columns,
        rows,
        numbers=columns[2:],
        spared=("SETTLED", "LIMIT", "MAX DEBT", "WE SERVED", "THEY SERVED"),
        wide=wide,
    )
    for one in found:
        if one.waiting != "0":
            click.echo(
                f"{one.name} has not accepted {one.waiting} {one.currency} more: 'ledger settle' "
                "shows it the proofs, 'ledger forgive' writes them off.",
                err=True,
            )


@ledger.command()
@home_option
@json_option
@wide_option
@click.argument("peer")
@click.option("--statement", metavar="ID", help="Only the entries of this statement.")
@click.option("--limit", type=click.IntRange(1, 2**31), default=100, help="100 if not set.")
def show(
    home: Path, as_json: bool, wide: bool, peer: str, statement: str | None, limit: int
) -> None:
    """List the newest entries with a PEER; with --json with their proofs and signatures."""
    from pinaivu_box.ledger import statement as ledger_statement
    from pinaivu_box.ledger.views import EntryView, entry_view, find

    own = own_node(home)

    async def work(database: Any) -> list[EntryView]:
        node = await find(database, peer, own)
        found = await ledger_statement.of_peer(database, node, limit=limit, statement=statement)
        return [entry_view(one) for one in found]

    found = with_database(home, work)
    if as_json:
        print_json(found)
        return
    columns = (
        "AT (UTC)",
        "REQUEST",
        "LEG",
        "CHOICE",
        "SERVED BY",
        "AMOUNT",
        "CURRENCY",
        "STATEMENT",
    )
    rows = [
        (
            short_time(one.at),
            one.request_id,
            str(one.leg),
            str(one.choice),
            "us" if one.served_by_us else "them",
            one.amount,
            one.currency,
            one.statement or _state(one),
        )
        for one in found
    ]
    print_table(
        columns,
        rows,
        numbers=("LEG", "CHOICE", "AMOUNT"),
        spared=("CHOICE", "LEG", "STATEMENT", "CURRENCY", "SERVED BY"),
        wide=wide,
    )
    for one in found:
        if one.disputed and not one.accepted:
            click.echo(f"{one.request_id}: the peer says: {one.disputed}", err=True)


@ledger.command()
@home_option
@json_option
@click.argument("peer")
def settle(home: Path, as_json: bool, peer: str) -> None:
    """Compare the books with a PEER, and sign what both agree on; exit 1 if they differ.

    Both boxes must run.  What is signed still is to be made good: see 'ledger paid'.
    """
    from urllib.parse import quote

    path = f"/v1/admin/ledger/{quote(peer, safe='')}/settle"
    done = ask_running(home, path, method="POST", seconds=_SETTLE_SECONDS)
    if as_json:
        print_json(done)
    else:
        _tell(done)
    if done["differences"]:
        sys.exit(1)


@ledger.command()
@home_option
@json_option
@click.argument("peer")
def forgive(home: Path, as_json: bool, peer: str) -> None:
    """Write off what a PEER was served and has not accepted: its credit limit has room again.

    What it accepts later all the same counts again.
    """
    from pinaivu_box.ledger import claims
    from pinaivu_box.ledger.views import find

    async def work(database: Any) -> claims.Forgiven:
        return await claims.forgive(database, await find(database, peer, own_node(home)), actor())

    made = with_database(home, work)
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made.entries} entries were written off: {_owed(made.amounts)}.")


@ledger.command()
@home_option
@json_option
@wide_option
@click.option("--peer", help="Only those with this peer.")
def ledger_statement(home: Path, as_json: bool, wide: bool, peer: str | None) -> None:
    """List what was settled, the newest first; with --json with the signed text."""
    from pinaivu_box.ledger.views import StatementView, all_statements, find

    async def work(database: Any) -> list[StatementView]:
        return await all_statements(database, peer and await find(database, peer, own_node(home)))

    found = with_database(home, work)
    if as_json:
        print_json(found)
        return
    columns = ("ID", "PEER", "NO", "AT (UTC)", "ENTRIES", "OWED TO US", "PAID")
    rows = [
        (
            one.id,
            one.name,
            str(one.sequence),
            short_time(one.at),
            str(one.entries),
            _owed(one.net),
            short_time(one.paid_at),
        )
        for one in found
    ]
    print_table(
        columns,
        rows,
        numbers=("NO", "ENTRIES", "OWED TO US"),
        spared=("ENTRIES", "NO", "AT (UTC)", "PAID"),
        wide=wide,
    )


@ledger.command()
@home_option
@click.argument("statement")
def paid(home: Path, statement: str) -> None:
    """Note that what a STATEMENT left over was made good: it leaves this box's balance.

    For this box alone: the other keeps its own note.
    """
    from pinaivu_box.ledger import statement as store

    with_database(home, lambda database: store.pay(database, statement, actor()))


def _tell(done: dict[str, Any]) -> None:
    for one in done["statements"]:
        click.echo(
            f"{one['id']}: {one['entries']} entries, signed by both; {one['name']} owes us "
            f"{_owed(one['net'])}"
        )
    if done["taken"] or done["given"]:
        click.echo(f"entries that were lost: {done['taken']} here, {done['given']} there")
    if done["accepted"]:
        click.echo(f"entries that had not been accepted, and are now: {done['accepted']}")
    for one in (*done["disputed"], *done["differences"]):
        click.echo(
            f"{one['request_id']} (leg {one['leg']}, choice {one['choice']}): we say "
            f"{one['ours'] or 'nothing'}, they say {one['theirs'] or 'nothing'}: {one['why']}"
        )
    if done["differences"]:
        click.echo("nothing is settled until the boxes agree on these")
    elif not done["statements"]:
        click.echo("there is nothing to settle")


def _state(one: Any) -> str:
    if one.accepted:
        return "open"
    return "forgiven" if one.forgiven_at else "disputed" if one.disputed else "not accepted"


def _owed(net: dict[str, str]) -> str:
    return ", ".join(f"{owed} {currency}" for currency, owed in net.items()) or "0"
