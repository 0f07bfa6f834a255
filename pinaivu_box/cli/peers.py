"""`pinaivu peers`: the boxes of this box's network."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.client import path_of, request, request_or_open
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import load_config, with_database
from pinaivu_box.cli.options import (
    NONE,
    json_option,
    settings,
    span,
    standard_options,
    whole_number,
    wide_option,
)
from pinaivu_box.cli.render import Column, print_json, print_list
from pinaivu_box.config import is_host_port
from pinaivu_box.errors import CliError, NotRunning, UsageError

_PATH = "/v1/admin/peers"
_FOUND_COLUMNS = (
    Column("NAME", attrgetter("name")),
    Column("ADDRESS", lambda box: ", ".join(box.addresses), cut="end"),
    Column("VERSION", attrgetter("software"), drop=2),
    Column("ID", attrgetter("id"), drop=1),
)
_LIMITS = (
    ("--max-parallel", "max_parallel", "N", "Maximum requests that run at the same time."),
    ("--tokens-per-minute", "tokens_per_minute", "N", "Maximum tokens in any minute; 0: no limit."),
    ("--credit-limit", "credit_limit", "AMOUNT", "Maximum that it may owe this box."),
    ("--hours", "hours", "TIMES", 'When it is served, for example "18:00-08:00".'),
)


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each limit; it arrives as a keyword argument named as the limit."""
    for option, name, metavar, text in reversed(_LIMITS):
        command = click.option(option, name, metavar=metavar, help=text)(command)
    return click.option(
        "--model",
        "models",
        multiple=True,
        metavar="GLOB",
        help="Models that it may use.  Repeatable.",
    )(command)


def _limits(values: dict[str, Any]) -> dict[str, Any]:
    """The limits as the API takes them.  Raises UsageError."""
    parsers = dict.fromkeys(("max_parallel", "tokens_per_minute"), whole_number)
    return settings(values, parsers, lambda name: "--" + name.replace("_", "-"))


@click.group(cls=Group)
def peers() -> None:
    """Join boxes into one network, and manage its members.

    PEER is the name of a peer as 'peers ls' shows it, or its id.  'peers invite' on one box prints
    a ticket; 'peers join TICKET' on another box makes it a member of the same network.  The box
    that serves a request can read its prompt: invite only boxes that you trust with yours.
    """


@peers.command(context_settings={"show_default": True})
@standard_options(config=True)
@click.option("--name", help="Name of the new member.  [default: the name it gives itself]")
@click.option("--expires", metavar="DURATION", default="1h", help="Validity of the ticket.")
@click.option(
    "--uses", type=click.IntRange(1, 1000), default=1, help="Number of boxes that may join."
)
@click.option("--admin", is_flag=True, help="The new member may invite and remove members.")
def invite(home: Path, config: Path | None, as_json: bool, **body: Any) -> None:
    """Print a ticket with which another box can join.

    On a terminal it is also shown as a QR code.  Whoever has the ticket can join: treat it as a
    password.
    """
    from pinaivu_box.cli.peer_tables import print_ticket
    from pinaivu_box.server.admin_peers import OFF

    span("--expires", body["expires"])
    path = f"{_PATH}/invitations"
    invitation = request_or_open(home, config, path, method="POST", body=body, needs_peering=OFF)
    if as_json:
        print_json(invitation)
    else:
        print_ticket(invitation)


@peers.command()
@standard_options(config=True)
@click.argument("ticket")
@click.option(
    "--at",
    multiple=True,
    metavar="HOST:PORT",
    help="Address of the inviting box, if the ticket does not contain it.  Repeatable.",
)
def join(home: Path, config: Path | None, as_json: bool, ticket: str, at: tuple[str, ...]) -> None:
    """Join the network of the box that issued TICKET.

    With '-', the ticket is read from standard input.  The inviting box must be running; this box
    need not be.
    """
    from pinaivu_box.doctor.home import is_served
    from pinaivu_box.membership.tickets import TicketInvalid, decode

    text = sys.stdin.read() if ticket == "-" else ticket
    try:
        decode(text)
    except TicketInvalid as error:
        raise UsageError(str(error)) from error
    for address in at:
        if not is_host_port(address):
            raise UsageError(f"--at: '{address}' is not HOST:PORT, such as box.example.org:4002.")
    body = {"ticket": text, "at": at}
    peer = request_or_open(home, config, _PATH, method="POST", body=body)
    if as_json:
        print_json(peer)
    click.echo(f"This box and {peer['name']} are now members of one network.", err=True)
    if not (is_served(home) or load_config(home, config).peering.enabled):
        click.echo(
            "Start it with 'pinaivu serve --peering', or set enabled = true under [peering].",
            err=True,
        )


@peers.command()
@standard_options(wide=True)
@click.option("--why", is_flag=True, help="Explain states and reputations.")
def ls(home: Path, as_json: bool, wide: bool, why: bool) -> None:
    """List the other boxes of the network and what they offer."""
    from pinaivu_box.cli.peer_tables import print_own_state, print_peers

    answer = request(home, _PATH)
    if as_json:
        print_json(answer["data"])
    else:
        print_peers(answer["data"], why=why, wide=wide)
    print_own_state(answer["own"])


@peers.command()
@standard_options(wide=True)
@click.argument("peer")
def show(home: Path, as_json: bool, wide: bool, peer: str) -> None:
    """Show a peer, what it offers, and its limits on this box."""
    _print_peer(request(home, path_of(_PATH, peer)), as_json, wide)


@peers.command()
@standard_options(config=True)
@click.argument("peer")
@click.option("--name", metavar="TEXT", help="Its name on this box; other boxes do not see it.")
@_limit_options
@click.option("--block", metavar="REASON", help="Neither serve it nor send it requests.")
@click.option("--unblock", is_flag=True, help="Undo --block.")
def edit(
    home: Path,
    config: Path | None,
    as_json: bool,
    peer: str,
    name: str | None,
    block: str | None,
    unblock: bool,
    **values: Any,
) -> None:
    """Change the name and the limits of a peer on this box.

    The value 'none' resets a limit to that of [peering.serve] in the configuration.
    """
    if block is not None and (unblock or not block.strip()):
        raise UsageError("--block needs a reason and cannot be used with --unblock.")
    limits = _limits(values)
    if unblock or block is not None:
        limits["blocked"] = block
    body: dict[str, Any] = {"limits": limits}
    if name is not None:
        body["name"] = None if name == NONE else name
    edited = request_or_open(home, config, path_of(_PATH, peer), method="PATCH", body=body)
    _print_peer(edited, as_json)


@peers.command()
@standard_options(config=True)
@click.argument("peer")
@click.option("--reason", default="", help="Shown to all members.")
def rm(home: Path, config: Path | None, as_json: bool, peer: str, reason: str) -> None:
    """Remove a box from the network permanently.

    From then on all members refuse it and the boxes that only it has invited.  Only the founder of
    the network can admit it again, with a new ticket.
    """
    body = {"reason": reason}
    roster = with_database(home, _roster)
    removed = request_or_open(home, config, path_of(_PATH, peer), method="DELETE", body=body)
    if as_json:
        print_json(removed)
    click.echo(f"{removed['name']} ({removed['id']}) is revoked.", err=True)
    if roster is not None and (orphans := roster.orphans(removed["id"])):
        names = ", ".join(f"{name} ({node})" for node, name in orphans.items())
        click.echo(
            f"Boxes that only {removed['name']} had invited are no longer members either: "
            f"{names}.  'pinaivu peers invite' admits them again.",
            err=True,
        )


async def _roster(database: Any) -> Any:
    """The members of the network, None if this box belongs to none."""
    from pinaivu_box.membership.store import MembershipStore

    members = MembershipStore(database)
    await members.load()
    return members.roster


@peers.command()
@standard_options(config=True)
@click.confirmation_option(prompt="Leave the network?")
def leave(home: Path, config: Path | None, as_json: bool) -> None:
    """Leave the network, to join another or none.

    The members only see that this box is unreachable; 'peers rm' on one of them revokes it.
    """
    answer = request_or_open(home, config, f"{_PATH}/leave", method="POST", body=None)
    if as_json:
        print_json(answer)
    click.echo(f"This box has left the network {answer['network'][:12]}.", err=True)


@peers.command()
@json_option
@wide_option
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=2.0,
    show_default=True,
    help="How long to listen.",
)
def discover(as_json: bool, wide: bool, seconds: float) -> None:
    """List the boxes on the LAN that announce themselves.

    A box does so with announce = true under [peering].
    """
    from pinaivu_box.transport.lan import nearby

    boxes = asyncio.run(nearby(seconds))
    print_list(boxes, _FOUND_COLUMNS, as_json=as_json, wide=wide)
    if not boxes and not as_json:
        click.echo("no box announces itself here: see announce under [peering]", err=True)


@peers.command()
@standard_options(config=True)
@click.argument("peer", required=False)
def doctor(home: Path, config: Path | None, as_json: bool, peer: str | None) -> None:
    """Check why peers cannot be reached or used.

    All peers are checked, or one PEER, and what to do is suggested.  Nothing is changed.  Exits
    with 1 if a check failed.
    """
    from msgspec import convert

    from pinaivu_box.cli.doctor import report
    from pinaivu_box.doctor.peers import examine
    from pinaivu_box.network.peer import PeerView
    from pinaivu_box.server.admin_peers import PeerList

    listed: PeerList | str
    try:
        listed = convert(request(home, _PATH), PeerList)
        chosen = (
            listed.data
            if peer is None
            else [convert(request(home, path_of(_PATH, peer)), PeerView)]
        )
    except CliError as error:
        if peer is not None and not isinstance(error, NotRunning):
            raise
        listed, chosen = error.message, []
    report(list(examine(home, load_config(home, config), listed, chosen)), as_json=as_json)


def _print_peer(peer: dict[str, Any], as_json: bool, wide: bool = False) -> None:
    from pinaivu_box.cli.peer_tables import print_peer

    if as_json:
        print_json(peer)
    else:
        print_peer(peer, wide)
