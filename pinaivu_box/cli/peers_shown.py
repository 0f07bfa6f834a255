"""Peers for eyes: tables, one peer, a ticket with its QR code.  Texts are the API's answers."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from pinaivu_box.amount import parse, to_text
from pinaivu_box.cli.tables import print_table

_COLOURS = {"connected": "green", "connecting": "yellow", "unreachable": "red", "revoked": "red"}
_COLUMNS = (
    "NAME", "STATE", "LINK", "RTT", "MODELS", "LOAD", "PRICE", "WE OWE", "REPUTATION", "CLOCK",
    "VERSION",
)  # fmt: skip
_NUMBERS = ("RTT", "CLOCK", "WE OWE")
# What a narrower terminal does not show, the first of them first.
_SPARED = ("VERSION", "CLOCK", "REPUTATION", "RTT", "LINK", "PRICE", "WE OWE", "LOAD")
UNKNOWN = "-"


def show_ticket(made: dict[str, Any]) -> None:
    """The ticket alone on standard output, so that a script can take it."""
    import segno

    click.echo(made["ticket"])
    if sys.stdout.isatty():
        # In capitals the code is smaller, and a ticket is the same in capitals.
        segno.make(made["ticket"].upper(), error="l").terminal(compact=True)
    uses = "once" if made["uses"] == 1 else f"for {made['uses']} boxes"
    click.echo(
        f"good {uses} until {made['expires_at']}; on the other box: pinaivu peers join TICKET",
        err=True,
    )


def show_all(found: list[dict[str, Any]], why: bool, wide: bool) -> None:
    if not found:
        click.echo("no other box: 'pinaivu peers invite' prints a ticket for one", err=True)
        return
    rows = [[cells[name] for name in _COLUMNS] for cells in map(_cells, found)]
    print_table(_COLUMNS, rows, numbers=_NUMBERS, cut={"MODELS": "end"}, spared=_SPARED, wide=wide)
    console = _console()
    for peer in found if why else ():
        console.print(Text(f"\n{peer['name']}", style="bold"))
        for line in _reasons(peer):
            console.print(Text(f"  {line}"))


def show_own(own: dict[str, Any]) -> None:
    """What the list of others cannot say: that this box belongs to them no more."""
    if own["state"] == "revoked":
        click.echo(
            f"This box is revoked: {own['why'].rstrip('.')}. Only a new ticket of the network's "
            "founder lets it in again ('pinaivu peers leave' makes it a box of its own).",
            err=True,
        )


def show_one(peer: dict[str, Any], wide: bool) -> None:
    console = _console()
    for name, text in _facts(peer):
        console.print(Text(f"{name:14}{text}"))
    if peer["models"]:
        console.print()
        _show_offers(peer, wide)


def _console() -> Console:
    """Into a pipe it is as wide as it needs to be: nothing is cut off there."""
    return Console(width=None if sys.stdout.isatty() else 100_000, markup=False, highlight=False)


def _cells(peer: dict[str, Any]) -> dict[str, Text]:
    link, models = peer["link"], peer["models"]
    state = "draining" if peer["draining"] and peer["state"] == "connected" else peer["state"]
    return {
        "NAME": Text(peer["name"]),
        "STATE": Text(state, style=_COLOURS.get(state, "yellow")),
        "LINK": Text(UNKNOWN if link is None else "direct" if link["direct"] else "relayed"),
        "RTT": Text(_milliseconds(link and link["rtt_ms"])),
        "MODELS": Text(_names([model["id"] for model in models])),
        "LOAD": Text(_load(models)),
        "PRICE": Text(_price(models)),
        "WE OWE": Text(_debt(peer)),
        "REPUTATION": Text(_reputation(peer)),
        "CLOCK": Text(_seconds(peer["clock_ahead"])),
        "VERSION": Text(peer["software"] or UNKNOWN),
    }


def _names(names: list[str]) -> str:
    more = f" +{len(names) - 2}" if len(names) > 2 else ""
    return (", ".join(names[:2]) + more) or UNKNOWN


def _load(models: list[dict[str, Any]]) -> str:
    if not models:
        return UNKNOWN
    places = sum(model["sequences"] for model in models)
    queue = sum(model["queue"] for model in models)
    busy = places - sum(model["sequences_free"] for model in models)
    return f"{busy}/{places}" + (f" +{queue}" if queue else "")


def _price(models: list[dict[str, Any]]) -> str:
    """The lowest of 1,000 completion tokens, and the highest if it is another."""
    prices = sorted(parse(model["price"]["completion"]) for model in models)
    if not prices:
        return UNKNOWN
    low, high = to_text(prices[0]), to_text(prices[-1])
    return low if low == high else f"{low} to {high}"


def _debt(peer: dict[str, Any]) -> str:
    """What this box owes it, of what it may."""
    if (cost := peer["cost"]) is None:
        return UNKNOWN
    return f"{cost['owes']}/{cost['max_debt']}" if cost["max_debt"] else str(cost["owes"])


def _reputation(peer: dict[str, Any]) -> str:
    found = peer["reputation"]
    return UNKNOWN if found is None else f"{found['value']:.2f}"


def _milliseconds(value: float | None) -> str:
    return UNKNOWN if value is None else "<1 ms" if value < 1 else f"{value:.0f} ms"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{round(value, 1) + 0.0:+.1f} s"


def _reasons(peer: dict[str, Any]) -> list[str]:
    found = peer["reputation"]
    said = [f"{peer['state']}: {peer['why'] or 'no reason is known'}"]
    said.append("reputation: " + ("nothing is known of it yet" if found is None else found["why"]))
    if peer["gone"]:
        said.append("others have lost their links to it")
    if peer["draining"]:
        said.append("it is stopping, and takes no new requests")
    if refusal := peer["refusal"]:
        said.append(f"{refusal['age']:.0f} s ago: {refusal['message']}")
    if peer["cost"] and (dear := peer["cost"]["too_dear"]):
        said.append(f"not used there, for their price is over max_price: {', '.join(dear)}")
    if (use := peer["use"]) and use["owes"] != "0":
        said.append(_owes(use))
    if blocked := peer["limits"]["blocked"]:
        said.append(f"blocked here: {blocked}")
    return said


def _owes(use: dict[str, Any]) -> str:
    limit = f" of at most {use['credit_limit']}" if use["credit_limit"] else ""
    waits = f", {use['unaccepted']} of it not accepted" if use["unaccepted"] != "0" else ""
    return f"owes {use['owes']}{limit}{waits}"


def _facts(peer: dict[str, Any]) -> list[tuple[str, str]]:
    link = peer["link"]
    limits = {name: value for name, value in peer["limits"].items() if value is not None}
    use = peer["use"]
    told = UNKNOWN if peer["advert_age"] is None else f"{peer['advert_age']:.0f} s ago"
    return [
        ("name", peer["name"]),
        ("id", peer["id"]),
        ("state", f"{peer['state']}: {peer['why']}" if peer["why"] else peer["state"]),
        ("link", UNKNOWN if link is None else _link(link)),
        ("addresses", ", ".join(peer["addresses"]) or UNKNOWN),
        ("version", peer["software"] or UNKNOWN),
        ("clock", _seconds(peer["clock_ahead"])),
        ("reputation", _reputation(peer)),
        ("invited by", peer["invited_by"] or UNKNOWN),
        ("admin", "yes" if peer["admin"] else "no"),
        ("member since", peer["member_since"] or UNKNOWN),
        ("last advert", told),
        (
            "has here",
            f"{use['running']} of {use['max_parallel']} requests, {use['tokens']} tokens in the "
            f"last minute, {_owes(use)}",
        ),
        ("cost us", "-" if peer["cost"] is None else _paid(peer["cost"])),
        *((name.replace("_", " "), _limit(value)) for name, value in limits.items()),
    ]


def _paid(cost: dict[str, Any]) -> str:
    most = f" of at most {cost['max_debt']}" if cost["max_debt"] else ""
    dear = f"; too dear: {', '.join(cost['too_dear'])}" if cost["too_dear"] else ""
    return f"{cost['received']} in all, we owe {cost['owes']}{most}{dear}"


def _link(link: dict[str, Any]) -> str:
    how = "direct" if link["direct"] else "relayed"
    return f"{how}, {link['address']}, {_milliseconds(link['rtt_ms'])}"


def _limit(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def _show_offers(peer: dict[str, Any], wide: bool) -> None:
    columns = ("MODEL", "DIGEST", "FREE", "QUEUE", "TTFT", "TOKENS/S", "PRICE")
    rows = [
        (
            model["id"],
            model["digest"].removeprefix("sha256:")[:12],
            f"{model['sequences_free']}/{model['sequences']}",
            str(model["queue"]),
            _milliseconds(model["ttft_ms"] or None),
            str(model["tokens_per_s"] or UNKNOWN),
            f"{model['price']['prompt']}/{model['price']['completion']} {peer['currency']}",
        )
        for model in peer["models"]
    ]
    spared = ("DIGEST", "QUEUE", "TTFT", "TOKENS/S", "FREE")
    print_table(columns, rows, spared=spared, wide=wide)
