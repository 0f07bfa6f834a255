"""Requests without a credential, as the key that `[server] anonymous_key` names.

An address alone says little: a web page that a user of the network has open can make a browser send
requests, also under a name that its owner lets lead here (DNS rebinding), and a proxy sends those
of the whole world from its own address.  So a request counts only if nothing speaks of either.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from pinaivu_box.errors import RowNotFound, Unauthorized
from pinaivu_box.policy import in_networks
from pinaivu_box.server_config import AnonymousKeyConfig
from pinaivu_box.store import keys
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key

CREDENTIALS = ("authorization", "x-api-key")
# What proxies add.  None is trusted here.
_FORWARDING = ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip")
_FORWARDING_PREFIX = "x-forwarded"
# What browsers say of requests that a page of another site has them send, or the user.
_OWN_SITE = ("same-origin", "none")
MISSING = "The API key is missing: send it in the header 'Authorization: Bearer sk-pnv-...'"


def has_credential(headers: Headers) -> bool:
    return any(name in headers for name in CREDENTIALS)


def check(config: AnonymousKeyConfig, headers: Headers, scheme: str, address: str) -> None:
    """Check that a request without a credential may be that of the anonymous key.  Raises
    Unauthorized."""
    if not config.key:
        raise Unauthorized(f"{MISSING}.")
    why = _objection(config, headers, scheme, address)
    if why:
        raise Unauthorized(f"{MISSING}; without one this box serves no request {why}.")


def _objection(config: AnonymousKeyConfig, headers: Headers, scheme: str, address: str) -> str:
    """Why not, as the end of a sentence; empty if there is no reason."""
    if not in_networks(address, config.networks):
        return f"from {address or 'an unknown address'}"
    if name := forwarded_by(headers):
        return f"that a proxy forwards (header {name})"
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _is_own_host(hosts[0], config.hosts):
        return "for a host name that it does not know (see [server.anonymous_key] hosts)"
    for origin in headers.getlist("origin"):
        if origin.lower() != f"{scheme}://{hosts[0]}".lower():
            return "of a web page of another origin"
    if any(site not in _OWN_SITE for site in headers.getlist("sec-fetch-site")):
        return "that a web page of another site makes"
    return ""


def forwarded_by(headers: Headers) -> str:
    """The name of a header by which a proxy says that it forwards the request; "" without one."""
    proxied = (
        name for name in headers if name in _FORWARDING or name.startswith(_FORWARDING_PREFIX)
    )
    return next(proxied, "")


def _is_own_host(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header has an IP address or one of these names."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if urlsplit(f"//{host}").netloc != host or "@" in host:
            return False
    except ValueError:
        return False
    if name in (known.lower() for known in names):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def find(config: AnonymousKeyConfig, database: Database) -> Key:
    """The key that such requests have.  Raises Unauthorized."""
    try:
        key = await keys.named(database, config.key)
    except RowNotFound as error:
        raise Unauthorized(
            f"{MISSING}; the key that [server.anonymous_key] names does not exist, or "
            "several have that name."
        ) from error
    if key.admin:
        raise Unauthorized(
            f"{MISSING}; the key that [server.anonymous_key] names has the scope admin, which "
            "nobody gets without a secret."
        )
    return key
