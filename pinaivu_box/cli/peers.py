"""`pinaivu peers`: the boxes of this box's network."""

from __future__ import annotations

import asyncio
import sys
from operator import attrgetter
from typing import Any

import click
from msgspec import convert

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import path_of, request, request_or_open
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.options import NONE, settings, span, standard_options, whole_number
from pinaivu_box.cli.render import Column
from pinaivu_box.errors import CliError, NotRunning, UsageError
from pinaivu_box.peering_config import is_host_port

_PATH = "/v1/admin/peers"
_FOUND_COLUMNS = (
    Column("NAME", attrgetter("name")),
    Column("ADDRESS", lambda box: ", ".join(box.addresses), cut="end"),
    Column("VERSION", attrgetter("software"), drop=2),
    Column("ID", attrgetter("id"), drop=1),
)
_PARSERS = {"max_parallel": whole_number, "tokens_per_minute": whole_number}


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
def invite(call: Call, **body: Any) -> None:
    """Print a ticket with which another box can join.

    On a terminal it is also shown as a QR code.  Whoever has the ticket can join: treat it as a
    password.
    """
    from pinaivu_box.cli.peer_tables import print_ticket
    from pinaivu_box.server.admin_peers import OFF

    span("--expires", body["expires"])
    path = f"{_PATH}/invitations"
    invitation = request_or_open(call, path, method="POST", body=body, needs_peering=OFF)
    call.print(invitation, print_ticket)


@peers.command()
@standard_options(config=True)
@click.argument("ticket")
@click.option(
    "--at",
    multiple=True,
    metavar="HOST:PORT",
    help="Address of the inviting box, if the ticket does not contain it.  Repeatable.",
)
def join(call: Call, ticket: str, at: tuple[str, ...]) -> None:
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
    peer = request_or_open(call, _PATH, method="POST", body={"ticket": text, "at": at})
    call.report(f"This box and {peer['name']} are now members of one network.", peer)
    if not (is_served(call.home) or call.config().peering.enabled):
        click.echo(
            "Start it with 'pinaivu serve --peering', or set enabled = true under [peering].",
            err=True,
        )


@peers.command()
@standard_options(wide=True)
@click.option("--why", is_flag=True, help="Explain states and reputations.")
def ls(call: Call, why: bool) -> None:
    """List the other boxes of the network and what they offer."""
    from pinaivu_box.cli.peer_tables import print_own_state, print_peers

    answer = request(call.home, _PATH)
    call.print(answer["data"], lambda peers: print_peers(peers, why=why, wide=call.wide))
    print_own_state(answer["own"])


@peers.command()
@standard_options(wide=True)
@click.argument("peer", shell_complete=suggestions.peers)
def show(call: Call, peer: str) -> None:
    """Show a peer, what it offers, and its limits on this box."""
    _print_peer(call, request(call.home, path_of(_PATH, peer)))


@peers.command()
@standard_options(config=True)
@click.argument("peer", shell_complete=suggestions.peers)
@click.option("--name", metavar="TEXT", help="Its name on this box; other boxes do not see it.")
@click.option(
    "--model", "models", multiple=True, metavar="GLOB", help="Models that it may use.  Repeatable."
)
@click.option("--max-parallel", metavar="N", help="Maximum requests that run at the same time.")
@click.option("--tokens-per-minute", metavar="N", help="Maximum tokens in any minute; 0: no limit.")
@click.option("--credit-limit", metavar="AMOUNT", help="Maximum that it may owe this box.")
@click.option("--hours", metavar="TIMES", help='When it is served, for example "18:00-08:00".')
@click.option("--block", metavar="REASON", help="Neither serve it nor send it requests.")
@click.option("--unblock", is_flag=True, help="Undo --block.")
def edit(
    call: Call, peer: str, name: str | None, block: str | None, unblock: bool, **values: Any
) -> None:
    """Change the name and the limits of a peer on this box.

    The value 'none' resets a limit to that of [peering.serve] in the configuration.
    """
    if block is not None and (unblock or not block.strip()):
        raise UsageError("--block needs a reason and cannot be used with --unblock.")
    limits = settings(values, _PARSERS)
    if unblock or block is not None:
        limits["blocked"] = block
    body: dict[str, Any] = {"limits": limits}
    if name is not None:
        body["name"] = None if name == NONE else name
    _print_peer(call, request_or_open(call, path_of(_PATH, peer), method="PATCH", body=body))


@peers.command()
@standard_options(config=True)
@click.argument("peer", shell_complete=suggestions.peers)
@click.option("--reason", default="", help="Shown to all members.")
def rm(call: Call, peer: str, reason: str) -> None:
    """Remove a box from the network permanently.

    From then on all members refuse it and the boxes that only it has invited.  Only the founder of
    the network can admit it again, with a new ticket.
    """
    body = {"reason": reason}
    roster = call.in_database(_roster)
    removed = request_or_open(call, path_of(_PATH, peer), method="DELETE", body=body)
    call.report(f"{removed['name']} ({removed['id']}) is revoked.", removed)
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
def leave(call: Call) -> None:
    """Leave the network, to join another or none.

    The members only see that this box is unreachable; 'peers rm' on one of them revokes it.
    """
    answer = request_or_open(call, f"{_PATH}/leave", method="POST", body=None)
    call.report(f"This box has left the network {answer['network'][:12]}.", answer)


@peers.command()
@standard_options(home=False, wide=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=2.0,
    show_default=True,
    help="How long to listen.",
)
def discover(call: Call, seconds: float) -> None:
    """List the boxes on the LAN that announce themselves.

    A box does so with announce = true under [peering].
    """
    from pinaivu_box.transport.lan import nearby

    boxes = asyncio.run(nearby(seconds))
    call.print_list(boxes, _FOUND_COLUMNS)
    if not boxes and not call.as_json:
        click.echo("no box announces itself here: see announce under [peering]", err=True)


@peers.command()
@standard_options(config=True)
@click.argument("peer", required=False, shell_complete=suggestions.peers)
def doctor(call: Call, peer: str | None) -> None:
    """Check why peers cannot be reached or used.

    All peers are checked, or one PEER, and what to do is suggested.  Nothing is changed.  Exits
    with 1 if a check failed.
    """
    from pinaivu_box.cli.doctor import report
    from pinaivu_box.doctor.peers import examine
    from pinaivu_box.network.peer import PeerView
    from pinaivu_box.server.admin_peers import PeerList

    listed: PeerList | str
    try:
        listed = convert(request(call.home, _PATH), PeerList)
        chosen = listed.data
        if peer is not None:
            chosen = [convert(request(call.home, path_of(_PATH, peer)), PeerView)]
    except CliError as error:
        if peer is not None and not isinstance(error, NotRunning):
            raise
        listed, chosen = error.message, []
    report(call, list(examine(call.home, call.config(), listed, chosen)))


def _print_peer(call: Call, peer: dict[str, Any]) -> None:
    from pinaivu_box.cli.peer_tables import print_peer

    call.print(peer, lambda peer: print_peer(peer, call.wide))
