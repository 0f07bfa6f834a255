"""The checks of `pinaivu peers doctor`: this box as other boxes reach it, then each peer.

All but the UDP ports and the clock of this machine is what the running box knows.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from pinaivu_box.amount import parse
from pinaivu_box.config import Config
from pinaivu_box.doctor import machine, relay, udp
from pinaivu_box.doctor.check import Check, State, of_error
from pinaivu_box.errors import WrongPeer
from pinaivu_box.legs.client import REFUSED
from pinaivu_box.network.peer import OwnView, PeerView, UseView
from pinaivu_box.server.admin_peers import PeerList
from pinaivu_box.store.witnessed import LOUD
from pinaivu_box.transport.transport import is_relay

_UDP_SECONDS = 2.0
_CLOCK_WARNING_SECONDS, _MAX_CLOCK_SECONDS = 5.0, 300.0
_MAX_REFUSAL_AGE = 3600.0  # seconds; the reason of an older refusal may be gone
_UDP: dict[udp.Answer, tuple[State, str, str]] = {
    "answers": ("ok", "a box answers there", ""),
    "closed": (
        "failed",
        "the machine answers, but no program listens on that UDP port",
        "start the box there",
    ),
    "silent": (
        "warning",
        "no answer: a firewall or a router drops the packets, or the machine is off",
        "open that UDP port there, or set [peering] relay on both boxes",
    ),
    "no route": (
        "warning",
        "this machine has no route to it",
        "connect both to one network or VPN",
    ),
    "unknown name": ("warning", "the name cannot be resolved", "check [peering] host there"),
}


def examine(
    home: Path, config: Config, listed: PeerList | str, peers: list[PeerView]
) -> Iterator[Check]:
    """Check this box and `peers`.

    `listed` is the list of the running box, or the sentence why there is none; `peers` are some of
    that list.
    """
    if isinstance(listed, str):
        yield of_error("peering", listed)
        return
    connected = sum(peer.state == "connected" for peer in listed.data)
    boxes = "box" if len(listed.data) == 1 else "boxes"
    network = listed.own.network[:12] or "no network yet"
    if listed.own.state == "revoked":
        todo = "ask the founder of the network for a new ticket, or leave it: 'pinaivu peers leave'"
        yield Check("membership", "failed", f"this box is revoked: {listed.own.why}", todo)
    counted = f"{network}: {len(listed.data)} other {boxes}, {connected} connected"
    todo = "" if listed.data else "'pinaivu peers invite' here, 'pinaivu peers join' there"
    yield Check("peering", "ok", counted, todo)
    yield from _here(listed.own, config, all_well=connected == len(listed.data))
    yield machine.clock(home, time.time())
    for peer in peers:
        for check in _peer(peer, listed.own, config):
            yield Check(f"{peer.name}: {check.name}", check.state, check.found, check.todo)


def _here(own: OwnView, config: Config, *, all_well: bool) -> Iterator[Check]:
    yield Check("key", "ok", f"{own.id}, called {own.name}")
    # Advertised addresses may only be reachable from outside.
    advertised = config.peering.advertise
    direct = [each for each in own.addresses if not is_relay(each) and each not in advertised]
    answers = {address: udp.ask(address, _UDP_SECONDS) for address in direct[:4]}
    silent = [address for address, answer in answers.items() if answer != "answers"]
    if silent:
        todo = "allow UDP in the firewall of this machine"
        yield Check("port", "failed", f"no answer at {', '.join(silent)}", todo)
    else:
        yield Check("port", "ok", f"this box answers at {', '.join(direct) or 'no address'}")
    if advertised:
        yield Check("NAT", "ok", f"this box advertises {', '.join(advertised)}")
    elif all(_reach(address) == "loopback" for address in direct) and own.relay == "none":
        finding = "only this machine can reach this box"
        yield Check("NAT", "warning", finding, 'set host = "0.0.0.0" in [peering]')
    elif own.relay != "none":
        yield _relay(own, "warning" if all_well else "failed")
    elif any(_reach(address) == "public" for address in direct):
        yield Check("NAT", "ok", "this box has a public address; no relay is used")
    else:
        finding = "this box has LAN addresses only, and no relay is used"
        todo = (
            f"for boxes elsewhere: forward UDP port {config.peering.port} to this box and set that "
            "address as advertise, or set a relay"
        )
        yield Check("NAT", "ok" if all_well else "warning", finding, "" if all_well else todo)


def _relay(own: OwnView, bad: State) -> Check:
    chosen = own.relay if own.relay != "n0" else next(filter(is_relay, own.addresses), None)
    if chosen is None:
        finding = "none of the public relays has answered yet"
        todo = "wait half a minute; then check that HTTPS and UDP are allowed, or set another URL"
        return Check("relay", bad, finding, f"{todo} as [peering] relay")
    return relay.own(chosen, bad)


def _reach(address: str) -> str:
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return "public"
    return "loopback" if ip.is_loopback else "public" if ip.is_global else "private"


def _peer(peer: PeerView, own: OwnView, config: Config) -> Iterator[Check]:
    yield _membership(peer)
    yield from _log(peer)
    if peer.state == "revoked":
        return
    yield _link(peer)
    if peer.link is None:
        yield from _ways(peer, own)
        return
    yield Check("key", "ok", f"authenticated as {peer.id}")
    yield _version(peer, own)
    yield _clock(peer)
    yield from _models(peer, own, config)
    limits = [*_serves_us(peer), *_is_served(peer, own)]
    yield from limits or [Check("limits", "ok", "no limit is reached")]


def _log(peer: PeerView) -> Iterator[Check]:
    for alarm in peer.log_alarms:
        loud = alarm.kind in LOUD
        todo = f"'pinaivu receipts evidence {alarm.id}' shows it"
        yield Check("log", "failed" if loud else "warning", alarm.detail.rstrip("."), todo)


def _membership(peer: PeerView) -> Check:
    if peer.state == "revoked":
        todo = "only the founder of the network can admit it again, with a new ticket"
        return Check("membership", "failed", peer.why or "it was revoked", todo)
    since = f" since {peer.member_since}" if peer.member_since else ""
    invited = f", invited by {peer.invited_by}" if peer.invited_by else ""
    return Check("membership", "ok", f"a member{since}{invited}")


def _link(peer: PeerView) -> Check:
    if peer.link is not None:
        route = "direct" if peer.link.direct else "by a relay"
        rtt = "" if peer.link.rtt_ms is None else f", round trip {peer.link.rtt_ms:.0f} ms"
        return Check("link", "ok", f"{route}, {peer.link.address}{rtt}")
    if peer.state == "connecting" and not peer.why:
        return Check("link", "warning", "no answer yet", "wait a few seconds")
    name = "key" if peer.why.startswith(WrongPeer.beginning) else "link"
    check = of_error(name, peer.why or "there is none")
    return check if check.todo else Check(name, "failed", check.found, "see its addresses below")


def _ways(peer: PeerView, own: OwnView) -> Iterator[Check]:
    """The checks of its addresses; a machine that answers at one of them is reachable."""
    if not peer.addresses:
        finding = "none of its addresses is known"
        yield Check("address", "failed", finding, "ask its operator for a ticket, and join again")
    for address in peer.addresses:
        if is_relay(address):
            yield _way_by_relay(address, own)
            continue
        answer = udp.ask(address, _UDP_SECONDS)
        state, finding, todo = _UDP[answer]
        yield Check("address", state, f"{address}: {finding}", todo)


def _way_by_relay(url: str, own: OwnView) -> Check:
    if own.relay == "none":
        finding = f"reachable through {url}, but this box uses no relay"
        return Check("relay", "warning", finding, "set [peering] relay here too")
    if why := relay.why_not(url):
        return Check("relay", "failed", why, relay.TODO)
    return Check("relay", "ok", f"reachable through {url} while the peer is online")


def _version(peer: PeerView, own: OwnView) -> Check:
    if peer.software == own.software:
        return Check("version", "ok", f"{peer.software}, as on this box")
    todo = "if something does not work, update the older one"
    return Check("version", "ok", f"{peer.software}, this box has {own.software}", todo)


def _clock(peer: PeerView) -> Check:
    ahead = peer.clock_ahead or 0.0
    finding = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} this box"
    if abs(ahead) <= _CLOCK_WARNING_SECONDS:
        return Check("clock", "ok", finding)
    state: State = "failed" if abs(ahead) > _MAX_CLOCK_SECONDS else "warning"
    return Check("clock", state, finding, "set the clock of the box that is wrong: 'timedatectl'")


def _models(peer: PeerView, own: OwnView, config: Config) -> Iterator[Check]:
    ours = {model.id: model.digest for model in own.models}
    if peer.advert_age is None:
        finding = "no recent advert"
        yield Check("models", "warning", finding, "wait half a minute; then check that box")
        return
    if not peer.models:
        yield Check("models", "warning", "it offers no models", "run 'pinaivu ls' there")
    for model in peer.models:
        here = ours.get(model.id)
        if here is None or here == model.digest or config.peering.same_name:
            same = "" if here is None else ", the same file as on this box" * (here == model.digest)
            yield Check("models", "ok", f"{model.id}{same}")
        else:
            digests = f"there ({model.digest[:8]}) than here ({here[:8]})"
            finding = f"{model.id} is another file {digests}"
            todo = "copy one of them, or set same_name = true in [peering]"
            yield Check("models", "warning", finding, todo)


def _serves_us(peer: PeerView) -> Iterator[Check]:
    """Known reasons why it does not serve requests of this box."""
    if peer.draining:
        yield Check("limits", "warning", "it is stopping", "wait until it runs again")
    if peer.models and not any(model.sequences_free for model in peer.models):
        yield Check("limits", "warning", "it is busy", "wait: requests are queued")
    if peer.refusal is not None and peer.refusal.age < _MAX_REFUSAL_AGE:
        reason = peer.refusal.message.partition(REFUSED)[2] or peer.refusal.message
        finding = f"{peer.refusal.age:.0f} s ago it refused a request: {reason.rstrip('.')}"
        todo = "its operator can change this: 'pinaivu peers edit' or [peering.serve] there"
        yield Check("limits", "warning", finding, todo)


def _is_served(peer: PeerView, own: OwnView) -> Iterator[Check]:
    """Reasons why this box does not serve its requests."""
    edit = f"pinaivu peers edit {peer.name}"
    if peer.limits.blocked:
        finding = f"blocked on this box: {peer.limits.blocked}"
        yield Check("limits", "warning", finding, f"{edit} --unblock")
    if (use := peer.use) is None:
        return
    if not use.open:
        finding = f"served only from {use.hours} (local time of this box), not now"
        yield Check("limits", "warning", finding, f"wait, or {edit} --hours TIMES")
    if own.models and not any(
        fnmatchcase(model.id, glob) for model in own.models for glob in use.models
    ):
        finding = f"it may use {', '.join(use.models) or 'no model'}; no model of this box matches"
        yield Check("limits", "warning", finding, f"{edit} --model GLOB")
    if use.running >= use.max_parallel:
        finding = f"it has {use.running} requests running here, the maximum"
        yield Check("limits", "warning", finding, f"wait, or {edit} --max-parallel N")
    if use.tokens_per_minute is not None and use.tokens >= use.tokens_per_minute:
        finding = f"it used {use.tokens} tokens in the last minute, of {use.tokens_per_minute}"
        yield Check("limits", "warning", finding, f"wait, or {edit} --tokens-per-minute N")
    yield from _credit(peer, use)


def _credit(peer: PeerView, use: UseView) -> Iterator[Check]:
    if use.credit_limit is None or parse(use.owes) < parse(use.credit_limit):
        return
    service = "served only while this box is idle" if use.beyond == "idle" else "not served"
    waits = f" ({use.unaccepted} of it not accepted)" if use.unaccepted != "0" else ""
    finding = f"it owes {use.owes} of at most {use.credit_limit}{waits}, and is {service}"
    todo = (
        f"'pinaivu ledger settle {peer.name}', and 'ledger paid' or 'ledger forgive'; or "
        f"pinaivu peers edit {peer.name} --credit-limit AMOUNT"
    )
    yield Check("limits", "warning", finding, todo)
