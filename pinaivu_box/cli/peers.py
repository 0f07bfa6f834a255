"""`pinaivu peers`: who belongs to this box's network."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import (
    ask_running,
    config_option,
    home_option,
    json_option,
    load_config,
    print_json,
)
from pinaivu_box.cli.peer_options import NONE, limit_options, limits_of
from pinaivu_box.cli.peers_home import PATH, ask, path_of
from pinaivu_box.cli.tables import print_table, wide_option
from pinaivu_box.config import is_host_port, parse_span
from pinaivu_box.errors import CliError, NotRunning, UsageError


@click.group(cls=Group)
def peers() -> None:
    """Join boxes into one network, and see who belongs to it.

    A PEER is named as 'peers ls' shows it, or by its id.  'peers invite' on one box prints a
    ticket, and 'peers join TICKET' on another makes both members.  The box that serves a request
    sees its prompt: invite whom you trust with yours.
    """


@peers.command()
@home_option
@config_option
@json_option
@click.option("--name", help="What the newcomer will be called; its own name if not set.")
@click.option("--expires", metavar="DURATION", default="1h", help="1h if not set.")
@click.option("--uses", metavar="N", type=click.IntRange(1, 1000), default=1, help="1 if not set.")
@click.option("--admin", is_flag=True, help="It may invite and remove whomever it likes.")
def invite(
    home: Path,
    config: Path | None,
    as_json: bool,
    name: str | None,
    expires: str,
    uses: int,
    admin: bool,
) -> None:
    """Print a ticket for another box, on a terminal also as a QR code.

    Whoever has it can join: send it as you would a password.
    """
    from pinaivu_box.cli.peers_shown import show_ticket
    from pinaivu_box.server.admin_peers import OFF

    try:
        parse_span(expires)
    except ValueError as error:
        raise UsageError(f"--expires: {error}.") from error
    given = {"name": name, "expires": expires, "uses": uses, "admin": admin}
    made = ask(home, config, f"{PATH}/invitations", method="POST", body=given, off=OFF)
    if as_json:
        print_json(made)
    else:
        show_ticket(made)


@peers.command()
@home_option
@config_option
@json_option
@click.argument("ticket")
@click.option(
    "--at",
    multiple=True,
    metavar="HOST:PORT",
    help="Where that box is, if its ticket does not know.  Repeatable.",
)
def join(home: Path, config: Path | None, as_json: bool, ticket: str, at: tuple[str, ...]) -> None:
    """Join the network of the box that the TICKET is from ('-': it is read from standard input).

    That box must run; this one may, or may not.
    """
    from pinaivu_box.doctor.home import is_served
    from pinaivu_box.membership.tickets import TicketInvalid, decode

    given = sys.stdin.read() if ticket == "-" else ticket
    try:
        decode(given)
    except TicketInvalid as error:
        raise UsageError(str(error)) from error
    for address in at:
        if not is_host_port(address):
            raise UsageError(f"--at: '{address}' is not HOST:PORT, such as box.example.org:4002.")
    made = ask(home, config, PATH, method="POST", body={"ticket": given, "at": at})
    if as_json:
        print_json(made)
    click.echo(f"This box and {made['name']} are of one network now.", err=True)
    if not (is_served(home) or load_config(home, config).peering.enabled):
        click.echo(
            "Serve with 'pinaivu serve --peering', or set enabled = true under [peering].", err=True
        )


@peers.command()
@home_option
@json_option
@wide_option
@click.option("--why", is_flag=True, help="Explain states and reputations.")
def ls(home: Path, as_json: bool, wide: bool, why: bool) -> None:
    """List the other boxes of the network, and what they offer."""
    from pinaivu_box.cli.peers_shown import show_all, show_own

    answer = ask_running(home, PATH)
    found = answer["data"]
    if as_json:
        print_json(found)
    else:
        show_all(found, why, wide)
    show_own(answer["own"])


@peers.command()
@home_option
@json_option
@wide_option
@click.argument("peer")
def show(home: Path, as_json: bool, wide: bool, peer: str) -> None:
    """Show what is known of a peer, and the limits that it has here."""
    _print_peer(ask_running(home, path_of(peer)), as_json, wide)


@peers.command()
@home_option
@config_option
@json_option
@click.argument("peer")
@click.option("--name", metavar="TEXT", help="What it is called here; no other box sees it.")
@limit_options
@click.option("--block", metavar="REASON", help="Serve it nothing, and ask it nothing.")
@click.option("--unblock", is_flag=True, help="Take that back.")
def edit(
    home: Path,
    config: Path | None,
    as_json: bool,
    peer: str,
    name: str | None,
    block: str | None,
    unblock: bool,
    **settings: Any,
) -> None:
    """Change what a peer is called here, and how much it is served.

    The word 'none' puts a setting back to what [peering] of the configuration says.
    """
    if block is not None and (unblock or not block.strip()):
        raise UsageError("--block needs a reason, and excludes --unblock.")
    limits = limits_of(settings)
    if unblock or block is not None:
        limits["blocked"] = block
    body: dict[str, Any] = {"limits": limits}
    if name is not None:
        body["name"] = None if name == NONE else name
    _print_peer(ask(home, config, path_of(peer), method="PATCH", body=body), as_json)


@peers.command()
@home_option
@config_option
@json_option
@click.argument("peer")
@click.option("--reason", default="", help="All members are told.")
def rm(home: Path, config: Path | None, as_json: bool, peer: str, reason: str) -> None:
    """Remove a box from the network for good: all members cut it off.

    Only the network's founder can let it in again, with a new ticket.
    """
    gone = ask(home, config, path_of(peer), method="DELETE", body={"reason": reason})
    if as_json:
        print_json(gone)
    click.echo(f"{gone['name']} ({gone['id']}) is revoked.", err=True)


@peers.command()
@home_option
@config_option
@json_option
@click.confirmation_option(prompt="Leave the network?")
def leave(home: Path, config: Path | None, as_json: bool) -> None:
    """Leave the network: to join another, or to be alone again.

    Its members only see that this box is gone; 'rm' on one of them revokes it for good.
    """
    left = ask(home, config, f"{PATH}/leave", method="POST", body=None)
    if as_json:
        print_json(left)
    click.echo(f"This box has left {left['network'][:12]}.", err=True)


@peers.command()
@json_option
@wide_option
@click.option("--seconds", type=click.FloatRange(0.1, 60), default=2.0, help="2 if not set.")
def discover(as_json: bool, wide: bool, seconds: float) -> None:
    """List the boxes nearby that announce themselves ([peering] announce = true)."""
    from pinaivu_box.transport.lan import nearby

    found = asyncio.run(nearby(seconds))
    if as_json:
        print_json(found)
        return
    rows = [(box.name, ", ".join(box.addresses), box.software, box.id) for box in found]
    print_table(
        ("NAME", "ADDRESS", "VERSION", "ID"),
        rows,
        cut={"ADDRESS": "end"},
        spared=("ID", "VERSION"),
        wide=wide,
    )
    if not found:
        click.echo("no box announces itself here: see announce under [peering]", err=True)


@peers.command()
@home_option
@config_option
@json_option
@click.argument("peer", required=False)
def doctor(home: Path, config: Path | None, as_json: bool, peer: str | None) -> None:
    """Say why peers (or one PEER) cannot be reached or used, and what to do.

    Exit 1 if a check failed.  Nothing is changed.
    """
    from msgspec import convert

    from pinaivu_box.cli.doctor import show_checks
    from pinaivu_box.doctor.peers import examine
    from pinaivu_box.network.peer import PeerView
    from pinaivu_box.server.admin_peers import PeerList

    found: Any
    try:
        found = convert(ask_running(home, PATH), PeerList)
        one = None if peer is None else convert(ask_running(home, path_of(peer)), PeerView)
    except CliError as error:
        if peer is not None and not isinstance(error, NotRunning):
            raise
        found, one = error.message, None
    chosen = [one] if one else [] if isinstance(found, str) else found.data
    checks = list(examine(home, load_config(home, config), found, chosen))
    if as_json:
        print_json(checks)
    else:
        show_checks(checks)
    if any(check.state == "failed" for check in checks):
        sys.exit(1)


def _print_peer(found: Any, as_json: bool, wide: bool = False) -> None:
    from pinaivu_box.cli.peers_shown import show_one

    if as_json:
        print_json(found)
    else:
        show_one(found, wide)
