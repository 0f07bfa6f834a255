"""`pinaivu ledger`: what peers owe this box, and what it owes them."""

from __future__ import annotations

import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.client import path_of, request
from pinaivu_box.cli.evidence import evidence_of
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.options import limit_option, standard_options
from pinaivu_box.cli.render import (
    UNKNOWN,
    Column,
    money,
    print_json,
    print_steps,
    time_text,
)
from pinaivu_box.cli.transcripts import key_file_option

_PATH = "/v1/admin/ledger"
_SETTLE_SECONDS = 330.0


def _state(entry: Any) -> str:
    if entry.accepted:
        return "open"
    return "forgiven" if entry.forgiven_at else "disputed" if entry.disputed else "not accepted"


_BALANCE_COLUMNS = (
    Column("PEER", attrgetter("name")),
    Column("CURRENCY", attrgetter("currency")),
    Column("WE SERVED", attrgetter("served"), number=True, drop=4),
    Column("THEY SERVED", attrgetter("received"), number=True, drop=5),
    Column(
        "SETTLED",
        lambda balance: f"{balance.settled_served} / {balance.settled_received}",
        number=True,
        drop=1,
    ),
    Column("BALANCE", attrgetter("balance"), number=True),
    Column("UNACCEPTED", attrgetter("waiting"), number=True),
    Column("LIMIT", lambda balance: balance.credit_limit or UNKNOWN, number=True, drop=2),
    Column("MAX DEBT", lambda balance: balance.max_debt or UNKNOWN, number=True, drop=3),
)
_ENTRY_COLUMNS = (
    Column("AT (UTC)", lambda entry: time_text(entry.at)),
    Column("REQUEST", attrgetter("request_id")),
    Column("LEG", lambda entry: str(entry.leg), number=True, drop=2),
    Column("CHOICE", lambda entry: str(entry.choice), number=True, drop=1),
    Column("SERVED BY", lambda entry: "us" if entry.served_by_us else "them", drop=5),
    Column("AMOUNT", attrgetter("amount"), number=True),
    Column("CURRENCY", attrgetter("currency"), drop=4),
    Column("STATEMENT", lambda entry: entry.statement or _state(entry), drop=3),
)
_DISPROOF_COLUMNS = (
    Column("AT (UTC)", lambda disproof: time_text(disproof.at)),
    Column("PEER", attrgetter("name")),
    Column("REQUEST", attrgetter("request_id")),
    Column("LEG", lambda disproof: str(disproof.leg), number=True, drop=2),
    Column("CHOICE", lambda disproof: str(disproof.choice), number=True, drop=1),
    Column("AMOUNT", attrgetter("amount"), number=True, drop=4),
    Column("CURRENCY", attrgetter("currency"), drop=3),
)
_STATEMENT_COLUMNS = (
    Column("ID", attrgetter("id")),
    Column("PEER", attrgetter("name")),
    Column("NO", lambda statement: str(statement.sequence), number=True, drop=2),
    Column("AT (UTC)", lambda statement: time_text(statement.at), drop=3),
    Column("ENTRIES", lambda statement: str(statement.entries), number=True, drop=1),
    Column("OWED TO US", lambda statement: money(statement.net), number=True),
    Column("PAID", lambda statement: time_text(statement.paid_at), drop=4),
)


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
@standard_options(config=True, wide=True)
def ledger(context: click.Context, call: Call) -> None:
    """Show what each peer owes this box; a negative balance is what this box owes.

    THEY SERVED is what this box has to pay for; it owes at most MAX DEBT ([peering] max_debt).
    """
    if context.invoked_subcommand is not None:
        return
    from pinaivu_box.ledger.views import all_balances

    peering = call.config().peering
    balances = call.in_database(lambda database: all_balances(database, peering))
    call.print_list(balances, _BALANCE_COLUMNS)
    for balance in () if call.as_json else balances:
        if balance.waiting != "0":
            click.echo(
                f"{balance.name} has not accepted another {balance.waiting} {balance.currency}: "
                "'ledger settle' shows it the proofs, 'ledger forgive' writes them off.",
                err=True,
            )
        if balance.disproved != "0":
            click.echo(
                f"Of what {balance.name} served, {balance.disproved} {balance.currency} are for "
                "answers that audits have proven false: 'ledger disproofs' lists them.",
                err=True,
            )


@ledger.command()
@standard_options(wide=True)
@click.argument("peer", required=False, shell_complete=suggestions.peers)
def disproofs(call: Call, peer: str | None) -> None:
    """List what audits of PEER have proven false (of all without it).

    This box does not owe it; the peer's books still have it.  'ledger evidence' prints what shows
    it.
    """
    from pinaivu_box.ledger import views

    async def work(database: Any) -> list[Any]:
        node = await views.find(database, peer, call.node_id()) if peer else None
        return await views.all_disproofs(database, node)

    found = call.in_database(work)
    call.print_list(found, _DISPROOF_COLUMNS)
    for disproof in () if call.as_json else found:
        click.echo(f"{disproof.request_id}: {disproof.why}", err=True)


@ledger.command()
@standard_options()
@click.argument("request_id")
@key_file_option
@click.option("--leg", type=int, default=0, help="Number of the leg.  [default: 0]")
@click.option("--choice", type=int, default=0, help="Number of the choice.  [default: 0]")
def evidence(call: Call, request_id: str, key_file: str | None, leg: int, choice: int) -> None:
    """Print as JSON what shows that a leg of REQUEST_ID is false.

    With the key of the request (if its transcript is sealed) prompt and answer are in it, and
    whoever has the model can compute the leg again.
    """
    print_json(evidence_of(call, request_id, (leg, choice), key_file))


@ledger.command("check-evidence")
@standard_options()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def check_evidence(call: Call, file: Path) -> None:
    """Verify what 'ledger evidence' has printed, offline.

    Exits with 1 if a check fails.  It computes nothing again: 'receipts audit' does.
    """
    from pinaivu_box.audits.disproof import verify_evidence

    checks = verify_evidence(file.read_bytes())
    call.print(checks, print_steps)
    if not all(check.ok for check in checks):
        sys.exit(1)


@ledger.command()
@standard_options(wide=True)
@click.argument("peer", shell_complete=suggestions.peers)
@click.option("--statement", metavar="ID", help="Only the entries of this statement.")
@limit_option
def show(call: Call, peer: str, statement: str | None, limit: int) -> None:
    """List the newest entries with PEER.

    --json includes proofs and signatures.
    """
    from pinaivu_box.ledger import entry as ledger_entry
    from pinaivu_box.ledger.views import EntryView, entry_view, find

    async def work(database: Any) -> list[EntryView]:
        node = await find(database, peer, call.node_id())
        stored = await ledger_entry.of_peer(database, node, limit=limit, statement=statement)
        return [entry_view(entry) for entry in stored]

    entries = call.in_database(work)
    call.print_list(entries, _ENTRY_COLUMNS)
    for entry in () if call.as_json else entries:
        if entry.disputed and not entry.accepted:
            click.echo(f"{entry.request_id}: disputed by the peer: {entry.disputed}", err=True)


@ledger.command()
@standard_options()
@click.argument("peer", shell_complete=suggestions.peers)
def settle(call: Call, peer: str) -> None:
    """Settle with PEER: compare the ledgers, and sign statements.

    A statement has the entries that both boxes agree on.  It moves no money: see 'ledger paid'.
    Both boxes must be running.  Exits with 1 if the ledgers differ.
    """
    path = f"{path_of(_PATH, peer)}/settle"
    outcome = request(call.home, path, method="POST", seconds=_SETTLE_SECONDS)
    call.print(outcome, _print_outcome)
    if outcome["differences"]:
        sys.exit(1)


@ledger.command()
@standard_options()
@click.argument("peer", shell_complete=suggestions.peers)
def forgive(call: Call, peer: str) -> None:
    """Write off what PEER was served but has not accepted.

    It no longer counts towards the credit limit of PEER.  What PEER accepts later counts again.
    """
    from pinaivu_box.ledger import claims
    from pinaivu_box.ledger.views import find

    async def work(database: Any) -> claims.Forgiven:
        node = await find(database, peer, call.node_id())
        return await claims.forgive(database, node, actor())

    def print_text(forgiven: claims.Forgiven) -> None:
        click.echo(f"{forgiven.entries} entries were written off: {money(forgiven.amounts)}.")

    call.print(call.in_database(work), print_text)


@ledger.command()
@standard_options(wide=True)
@click.option("--peer", help="Only statements with this peer.")
def statements(call: Call, peer: str | None) -> None:
    """List the statements, newest first.

    --json includes the signed texts.
    """
    from pinaivu_box.ledger.views import StatementView, all_statements, find

    async def work(database: Any) -> list[StatementView]:
        node = peer and await find(database, peer, call.node_id())
        return await all_statements(database, node)

    call.print_list(call.in_database(work), _STATEMENT_COLUMNS)


@ledger.command()
@standard_options(json=False)
@click.argument("statement")
def paid(call: Call, statement: str) -> None:
    """Mark a STATEMENT as paid.

    Its amount leaves the balance on this box.  The other box is not told: it keeps its own record.
    """
    from pinaivu_box.ledger import statement as store

    call.in_database(lambda database: store.pay(database, statement, actor()))


def _print_outcome(outcome: dict[str, Any]) -> None:
    for statement in outcome["statements"]:
        click.echo(
            f"{statement['id']}: {statement['entries']} entries, signed by both; "
            f"{statement['name']} owes us {money(statement['net'])}"
        )
    if outcome["taken"] or outcome["given"]:
        click.echo(f"lost entries recovered: {outcome['taken']} here, {outcome['given']} there")
    if outcome["accepted"]:
        click.echo(f"entries that are accepted now: {outcome['accepted']}")
    for entry in (*outcome["disputed"], *outcome["differences"]):
        click.echo(
            f"{entry['request_id']} (leg {entry['leg']}, choice {entry['choice']}): we have "
            f"{entry['ours'] or 'nothing'}, they have {entry['theirs'] or 'nothing'}: "
            f"{entry['why']}"
        )
    if outcome["differences"]:
        click.echo("nothing is settled until the boxes agree on these entries")
    elif not outcome["statements"]:
        click.echo("there is nothing to settle")
