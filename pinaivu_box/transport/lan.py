"""Boxes on the LAN: announcing this one by DNS-SD over mDNS (RFC 6763), and discovering others.

An announcement tells everybody on the LAN the box's name, key and port: it is off unless the
operator switches it on.  Discovery tells nothing.  What is discovered is not verified: a box
becomes a member by a ticket alone.
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
from pinaivu_box.text import host_and_port
from pinaivu_box.transport import wire

TYPE = "_pinaivu._udp.local."
_MAX_KEY_CHARACTERS = 32  # of the key in a service's name: a DNS label has room for 63
_ANSWER_MS = 1500

log = logging.getLogger(__name__)


class LanBox(Struct, frozen=True):
    """A box as it announces itself."""

    id: str
    name: str
    addresses: list[str]
    software: str


async def announce(node_id: str, name: str, software: str, addresses: Sequence[str]) -> None:
    """Announce this box on the LAN until cancelled.  A failure is logged only: the box serves all
    the same."""
    info = _service(node_id, name, software, addresses)
    if info is None:
        log.warning("not announced on the LAN: peering listens on no IPv4 address")
        return
    try:
        async with AsyncZeroconf(ip_version=IPVersion.V4Only) as zeroconf:
            await zeroconf.async_register_service(info, allow_name_change=True)
            await asyncio.Event().wait()
    except (OSError, Error) as error:
        log.warning("not announced on the LAN: %s", error or type(error).__name__)


def _service(
    node_id: str, name: str, software: str, addresses: Sequence[str]
) -> ServiceInfo | None:
    """Return the announcement, None if no address is IPv4."""
    endpoints = [pair for address in addresses if (pair := _numeric(address)) is not None]
    if not endpoints:
        return None
    port = endpoints[0][1]
    return ServiceInfo(
        TYPE,
        f"{node_id.removeprefix(NODE_PREFIX)[:_MAX_KEY_CHARACTERS]}.{TYPE}",
        port=port,
        addresses=[ip.packed for ip, other_port in endpoints if other_port == port],
        properties={"node": node_id, "name": name, "software": software},
        server=f"pinaivu-{node_id.removeprefix(NODE_PREFIX)[:_MAX_KEY_CHARACTERS]}.local.",
    )


def _numeric(address: str) -> tuple[ipaddress.IPv4Address, int] | None:
    try:
        host, port = host_and_port(address)
        return ipaddress.IPv4Address(host), port
    except ValueError:
        return None  # a relay's URL, or IPv6, whose ports may differ


async def nearby(seconds: float) -> list[LanBox]:
    """Return the boxes that answer within that time, by name.  Raises CliError if the LAN cannot be
    queried."""
    names: set[str] = set()

    def on_change(zeroconf: object, service_type: str, name: str, state_change: object) -> None:
        names.add(name)

    try:
        async with AsyncZeroconf(ip_version=IPVersion.V4Only) as zeroconf:
            async with AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[on_change]):
                await asyncio.sleep(seconds)
            infos = [AsyncServiceInfo(TYPE, name) for name in names]
            requests = [info.async_request(zeroconf.zeroconf, _ANSWER_MS) for info in infos]
            await asyncio.gather(*requests)
    except OSError as error:
        raise CliError(f"The LAN cannot be queried: {error.strerror or error}.") from error
    boxes = [box for info in infos if (box := _box(info)) is not None]
    return sorted(boxes, key=lambda box: (box.name, box.id))


def _box(info: AsyncServiceInfo) -> LanBox | None:
    """Return the box, None if it is not the announcement of one."""
    properties = {key: value or "" for key, value in info.decoded_properties.items()}
    node, port = properties.get("node", ""), info.port
    if not node.startswith(NODE_PREFIX) or port is None:
        return None
    addresses = [f"{ip}:{port}" for ip in info.parsed_addresses(IPVersion.V4Only)]
    name = wire.printable(properties.get("name", ""))[:64]
    return LanBox(node, name, addresses, properties.get("software", "")[:64])
