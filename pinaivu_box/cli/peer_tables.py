"""How `pinaivu peers` prints peers, as the API shows them, and tickets."""

from __future__ import annotations

import sys
from operator import itemgetter
from typing import Any

import click
from rich.text import Text

from pinaivu_box.amount import parse, to_text
from pinaivu_box.cli.render import UNKNOWN, Column, print_fields, print_table

_COLOURS = {"connected": "green", "connecting": "yellow", "unreachable": "red", "revoked": "red"}
_MAX_NAMED_MODELS = 2


def print_ticket(invitation: dict[str, Any]) -> None:
    """Print the ticket alone on standard output, so that a script can read it."""
    import segno

    click.echo(invitation["ticket"])
    if sys.stdout.isatty():
        # A ticket means the same in capitals, of which the code is smaller.
        segno.make(invitation["ticket"].upper(), error="l").terminal(compact=True)
    uses = "once" if invitation["uses"] == 1 else f"for {invitation['uses']} boxes"
    click.echo(
        f"valid {uses}, until {invitation['expires_at']}; "
        "on the other box: pinaivu peers join TICKET",
        err=True,
    )


def print_peers(peers: list[dict[str, Any]], *, why: bool, wide: bool) -> None:
    if not peers:
        click.echo("no other box: 'pinaivu peers invite' prints a ticket for one", err=True)
        return
    print_table(peers, _PEER_COLUMNS, wide=wide)
    for peer in peers if why else ():
        click.secho(f"\n{peer['name']}", bold=True)
        for line in _reasons(peer):
            click.echo(f"  {line}")


def print_own_state(own: dict[str, Any]) -> None:
    """Say that this box is revoked, which a list of the others cannot show."""
    if own["state"] == "revoked":
        click.echo(
            f"This box is revoked: {own['why'].rstrip('.')}. Only a new ticket from the founder of "
            "the network admits it again ('pinaivu peers leave' makes it leave the network).",
            err=True,
        )


def print_peer(peer: dict[str, Any], wide: bool) -> None:
    print_fields(_fields(peer))
    if peer["models"]:
        click.echo()
        offers = [{**model, "currency": peer["currency"]} for model in peer["models"]]
        print_table(offers, _OFFER_COLUMNS, wide=wide)


def _state(peer: dict[str, Any]) -> Text:
    state = "draining" if peer["draining"] and peer["state"] == "connected" else peer["state"]
    return Text(state, style=_COLOURS.get(state, "yellow"))


def _route(link: dict[str, Any] | None) -> str:
    return UNKNOWN if link is None else "direct" if link["direct"] else "relayed"


def _models(peer: dict[str, Any]) -> str:
    names = [model["id"] for model in peer["models"]]
    more = len(names) - _MAX_NAMED_MODELS
    text = ", ".join(names[:_MAX_NAMED_MODELS]) + (f" +{more}" if more > 0 else "")
    return text or UNKNOWN


def _load(peer: dict[str, Any]) -> str:
    models = peer["models"]
    if not models:
        return UNKNOWN
    sequences = sum(model["sequences"] for model in models)
    queue = sum(model["queue"] for model in models)
    busy = sequences - sum(model["sequences_free"] for model in models)
    return f"{busy}/{sequences}" + (f" +{queue}" if queue else "")


def _price(peer: dict[str, Any]) -> str:
    """The lowest price of 1,000 completion tokens, and the highest if they differ."""
    prices = sorted(parse(model["price"]["completion"]) for model in peer["models"])
    if not prices:
        return UNKNOWN
    low, high = to_text(prices[0]), to_text(prices[-1])
    return low if low == high else f"{low} to {high}"


def _debt(peer: dict[str, Any]) -> str:
    """What this box owes it, out of the maximum."""
    if (cost := peer["cost"]) is None:
        return UNKNOWN
    return f"{cost['owes']}/{cost['max_debt']}" if cost["max_debt"] else str(cost["owes"])


def _reputation(peer: dict[str, Any]) -> str:
    reputation = peer["reputation"]
    return UNKNOWN if reputation is None else f"{reputation['value']:.2f}"


def _audits(peer: dict[str, Any]) -> str:
    audits = peer["audits"]
    parts = [str(audits["count"])]
    parts += [f"{audits[name]} {name}" for name in ("failed", "undecided") if audits.get(name)]
    return UNKNOWN if parts == ["0"] else ", ".join(parts)


def _milliseconds(value: float | None) -> str:
    return UNKNOWN if value is None else "<1 ms" if value < 1 else f"{value:.0f} ms"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{round(value, 1) + 0.0:+.1f} s"


_PEER_COLUMNS = (
    Column("NAME", itemgetter("name")),
    Column("STATE", _state),
    Column("LINK", lambda peer: _route(peer["link"]), drop=5),
    Column("RTT", lambda peer: _milliseconds(peer["link"] and peer["link"]["rtt_ms"]),
           number=True, drop=4),
    Column("MODELS", _models, cut="end"),
    Column("LOAD", _load, drop=8),
    Column("PRICE", _price, drop=6),
    Column("WE OWE", _debt, number=True, drop=7),
    Column("REPUTATION", _reputation, drop=3),
    Column("AUDITS", _audits, drop=2),
    Column("CLOCK", lambda peer: _seconds(peer["clock_ahead"]), number=True, drop=2),
    Column("VERSION", lambda peer: peer["software"] or UNKNOWN, drop=1),
)  # fmt: skip
_OFFER_COLUMNS = (
    Column("MODEL", itemgetter("id")),
    Column("DIGEST", lambda offer: offer["digest"].removeprefix("sha256:")[:12], drop=1),
    Column("FREE", lambda offer: f"{offer['sequences_free']}/{offer['sequences']}", drop=5),
    Column("QUEUE", lambda offer: str(offer["queue"]), drop=2),
    Column("TTFT", lambda offer: _milliseconds(offer["ttft_ms"] or None), drop=3),
    Column("TOKENS/S", lambda offer: str(offer["tokens_per_s"] or UNKNOWN), drop=4),
    Column(
        "PRICE",
        lambda offer: (
            f"{offer['price']['prompt']}/{offer['price']['completion']} {offer['currency']}"
        ),
    ),
)


def _reasons(peer: dict[str, Any]) -> list[str]:
    reputation = peer["reputation"]
    reasons = [
        f"{peer['state']}: {peer['why'] or 'no reason is known'}",
        f"reputation: {'nothing is known yet' if reputation is None else reputation['why']}",
    ]
    reasons += [f"its log: {alarm['detail']}" for alarm in peer["log_alarms"]]
    if peer["gone"]:
        reasons.append("other members have lost their links to it")
    if peer["draining"]:
        reasons.append("it is stopping and takes no new requests")
    if refusal := peer["refusal"]:
        reasons.append(f"{refusal['age']:.0f} s ago: {refusal['message']}")
    if peer["cost"] and (too_dear := peer["cost"]["too_dear"]):
        reasons.append(f"not used, because the price is above max_price: {', '.join(too_dear)}")
    if (use := peer["use"]) and use["owes"] != "0":
        reasons.append(_owes(use))
    if reason := peer["limits"]["blocked"]:
        reasons.append(f"blocked on this box: {reason}")
    return reasons


def _owes(use: dict[str, Any]) -> str:
    limit = f" of at most {use['credit_limit']}" if use["credit_limit"] else ""
    waiting = f", {use['unaccepted']} of it not accepted" if use["unaccepted"] != "0" else ""
    return f"owes {use['owes']}{limit}{waiting}"


def _fields(peer: dict[str, Any]) -> dict[str, str]:
    link, use, cost, age = peer["link"], peer["use"], peer["cost"], peer["advert_age"]
    limits = {name: value for name, value in peer["limits"].items() if value is not None}
    return {
        "name": peer["name"],
        "id": peer["id"],
        "state": f"{peer['state']}: {peer['why']}" if peer["why"] else peer["state"],
        "link": UNKNOWN if link is None else _link(link),
        "addresses": ", ".join(peer["addresses"]) or UNKNOWN,
        "version": peer["software"] or UNKNOWN,
        "clock": _seconds(peer["clock_ahead"]),
        "reputation": _reputation(peer),
        "audits": _audits(peer),
        "invited by": peer["invited_by"] or UNKNOWN,
        "admin": "yes" if peer["admin"] else "no",
        "member since": peer["member_since"] or UNKNOWN,
        "last advert": UNKNOWN if age is None else f"{age:.0f} s ago",
        "uses": (
            f"{use['running']} of {use['max_parallel']} requests, {use['tokens']} tokens in the "
            f"last minute, {_owes(use)}"
        ),
        "cost to us": UNKNOWN if cost is None else _cost(cost),
        **{name.replace("_", " "): _limit(value) for name, value in limits.items()},
    }


def _cost(cost: dict[str, Any]) -> str:
    limit = f" of at most {cost['max_debt']}" if cost["max_debt"] else ""
    too_dear = f"; above max_price: {', '.join(cost['too_dear'])}" if cost["too_dear"] else ""
    return f"{cost['received']} in total, we owe {cost['owes']}{limit}{too_dear}"


def _link(link: dict[str, Any]) -> str:
    return f"{_route(link)}, {link['address']}, {_milliseconds(link['rtt_ms'])}"


def _limit(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)
