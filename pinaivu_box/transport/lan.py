"""Boxes nearby: this one told to the LAN by DNS-SD over mDNS (RFC 6763), and those found there.

Announcing tells everybody on the LAN that a box is here, its name, key and port: it is off unless
the operator switches it on.  Looking tells nothing.  What is found is hearsay: a box becomes a
member by a ticket alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence

from msgspec import Struct
from zeroconf import Error, IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from pinaivu_box.errors import CliError
from pinaivu_box.identity import NODE_PREFIX
from pinaivu_box.text import number

TYPE = "_pinaivu._udp.local."
_LABEL = 32  # characters of the key in a service's name: DNS has room for 63
_ANSWER_MS = 1500

log = logging.getLogger(__name__)


class LanBox(Struct, frozen=True):
    """A box as it says of itself."""

    id: str
    name: str
    addresses: list[str]
    software: str


async def announce(node_id: str, name: str, software: str, addresses: Sequence[str]) -> None:
    """Tell the LAN of this box, until cancelled.  A LAN that cannot be told is a line in the log:
    the box serves all the same."""
    info = _service(node_id, name, software, addresses)
    if info is None:
        log.warning("not announced on the LAN: peering listens on no IPv4 address")
        return
    try:
        zeroconf = AsyncZeroconf(ip_version=IPVersion.V4Only)
    except OSError as error:
        log.warning("not announced on the LAN: %s", error.strerror or error)
        return
    try:
        await zeroconf.async_register_service(info, allow_name_change=True)
        await asyncio.Event().wait()
    except (OSError, Error) as error:
        log.warning("not announced on the LAN: %s", error or type(error).__name__)
    finally:
        await zeroconf.async_unregister_all_services()
        await zeroconf.async_close()


def _service(
    node_id: str, name: str, software: str, addresses: Sequence[str]
) -> ServiceInfo | None:
    """None if no address is IPv4."""
    found = [pair for address in addresses if (pair := _numeric(address)) is not None]
    if not found:
        return None
    port = found[0][1]
    return ServiceInfo(
        TYPE,
        f"{node_id.removeprefix(NODE_PREFIX)[:_LABEL]}.{TYPE}",
        port=port,
        addresses=[ip.packed for ip, number in found if number == port],
        properties={"node": node_id, "name": name, "software": software},
        server=f"pinaivu-{node_id.removeprefix(NODE_PREFIX)[:_LABEL]}.local.",
    )


def _numeric(address: str) -> tuple[ipaddress.IPv4Address, int] | None:
    host, _, port = address.rpartition(":")
    found = number(port)
    try:
        return None if found is None else (ipaddress.IPv4Address(host), found)
    except ValueError:
        return None  # a relay's URL, or IPv6, whose ports may differ


async def nearby(seconds: float) -> list[LanBox]:
    """Those that answer within that time, by name.  CliError if the network cannot be asked."""
    names: set[str] = set()

    def heard(zeroconf: object, service_type: str, name: str, state_change: object) -> None:
        names.add(name)

    try:
        zeroconf = AsyncZeroconf(ip_version=IPVersion.V4Only)
    except OSError as error:
        raise CliError(f"The LAN cannot be asked: {error.strerror or error}.") from error
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[heard])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
        infos = [AsyncServiceInfo(TYPE, name) for name in names]
        await asyncio.gather(*(info.async_request(zeroconf.zeroconf, _ANSWER_MS) for info in infos))
    finally:
        await zeroconf.async_close()
    found = [box for info in infos if (box := _box(info)) is not None]
    return sorted(found, key=lambda box: (box.name, box.id))


def _box(info: AsyncServiceInfo) -> LanBox | None:
    """None if it does not say what a box says."""
    said = {key: value or "" for key, value in info.decoded_properties.items()}
    node, port = said.get("node", ""), info.port
    if not node.startswith(NODE_PREFIX) or port is None:
        return None
    addresses = [f"{ip}:{port}" for ip in info.parsed_addresses(IPVersion.V4Only)]
    name = "".join(letter for letter in said.get("name", "") if letter.isprintable())
    return LanBox(node, name[:64], addresses, said.get("software", "")[:64])
