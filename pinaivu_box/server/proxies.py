"""ASGI middleware, the outermost: the client of a request that a proxy forwards.

A proxy that `[server] trusted_proxies` names is believed: what it says of client, scheme and host
takes the place of the connection's, and its headers are gone afterwards.  Of all others these
headers say nothing; they stay, so that `anonymous` sees that a proxy is between.  They stay as well
if a trusted proxy does not say whose the request is: it must not pass for the proxy's own.

`X-Forwarded-Prefix` is taken from anyone while no proxy is trusted: only the answer to whoever sent
it depends on it, and it cannot lead to another host (`paths.forwarded_prefix`).  Where proxies are
trusted, it is theirs alone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_RawHeaders = list[tuple[bytes, bytes]]

_FORWARDED = b"x-forwarded"
_FOR, _PROTO, _HOST = b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"
_PREFIX = b"x-forwarded-prefix"
_VIA = b"via"
_SCHEMES = ("http", "https")
_HOST_VALUE = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_WITH_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9.]+)(?::[0-9]{1,5})?")
_MAX_HOPS = 32  # proxies in a chain that are looked at


class _Client(NamedTuple):
    """`hops` is the number of trusted proxies that the request came through, `beyond` the bytes of
    X-Forwarded-For before the client, which its own proxies may have written, or it itself."""

    address: str  # "" if the last trusted proxy named none that can be read
    hops: int
    beyond: bytes


class TrustProxies:
    def __init__(self, app: ASGIApp, trusted: Callable[[], tuple[str, ...]]) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trusted = self._trusted()
        if scope["type"] == "http" and trusted:
            scope = forwarded_by(scope, _networks(trusted))
        await self._app(scope, receive, send)


@lru_cache(maxsize=4)
def _networks(trusted: tuple[str, ...]) -> tuple[_Network, ...]:
    return tuple(map(ipaddress.ip_network, trusted))


def forwarded_by(scope: Scope, trusted: Sequence[_Network]) -> Scope:
    """The scope as the client of the outermost trusted proxy would have made it."""
    headers: _RawHeaders = scope["headers"]
    peer = _address(str(scope["client"][0]) if scope.get("client") else "")
    if not _is_in(peer, trusted):
        return {**scope, "headers": [one for one in headers if one[0] != _PREFIX]}
    entries = _list(headers, _FOR)
    client = _client(entries, trusted) if entries else _Client("", 1, b"")
    if entries:
        kept = _without_proxies(headers, client)
        scope = {**scope, "headers": kept, "client": (client.address, 0)}
    if (scheme := _said(_list(headers, _PROTO), client.hops).lower()) in _SCHEMES:
        scope = {**scope, "scheme": scheme}
    host = _said(_list(headers, _HOST), client.hops)
    if _HOST_VALUE.fullmatch(host):
        others = [one for one in scope["headers"] if one[0] != b"host"]
        scope = {**scope, "headers": [(b"host", host.encode()), *others]}
    return scope


def _client(entries: Sequence[str], trusted: Sequence[_Network]) -> _Client:
    """The right-most address that is no trusted proxy's; the left-most if all are theirs."""
    last = max(len(entries) - _MAX_HOPS, 0)
    for place in range(len(entries) - 1, last - 1, -1):
        address = _address(entries[place])
        if place == last or not _is_in(address, trusted):
            beyond = ", ".join(entries[:place]).encode("latin-1")
            return _Client(str(address or ""), len(entries) - place, beyond)
    raise AssertionError("there are entries")


def _said(values: Sequence[str], hops: int) -> str:
    """What the outermost trusted proxy said; each proxy replaces the value or adds its own."""
    return values[max(len(values) - hops, 0)] if values else ""


def _without_proxies(headers: _RawHeaders, client: _Client) -> _RawHeaders:
    """The headers without what the trusted proxies said of themselves and of the client."""
    kept = [
        (name, value)
        for name, value in headers
        if name == _PREFIX or not (name.startswith(_FORWARDED) or name in (_VIA, b"x-real-ip"))
    ]
    if client.beyond:
        kept.append((_FOR, client.beyond))
    if via := _list(headers, _VIA)[: -client.hops]:
        kept.append((_VIA, ", ".join(via).encode("latin-1")))
    return kept


def _list(headers: _RawHeaders, wanted: bytes) -> list[str]:
    """The entries of a header that may come several times."""
    values = [value.decode("latin-1") for name, value in headers if name == wanted]
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _address(text: str) -> _Address | None:
    """The IP address in an entry, which may have a port; None if there is none in it."""
    text = text.strip('"')
    if (match := _WITH_PORT.fullmatch(text)) is not None:
        text = match[1].strip("[]")
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


def _is_in(address: _Address | None, networks: Sequence[_Network]) -> bool:
    return address is not None and any(address in network for network in networks)
