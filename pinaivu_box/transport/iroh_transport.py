"""Links over QUIC by iroh 1.2.0.  Import this only where links are made: its library is 18 MB.

Nothing that iroh does is waited for without a time limit, but for what ends with the link.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import iroh
from iroh import IrohError

from pinaivu_box.errors import CliError, LinkLost, Unreachable, WrongPeer
from pinaivu_box.identity import NODE_PREFIX, Identity
from pinaivu_box.tasks import TaskSet, ignore_exception
from pinaivu_box.text import END, host_and_port
from pinaivu_box.transport import iroh_bindings, wire
from pinaivu_box.transport.link import LinkOptions, LinkView
from pinaivu_box.transport.transport import Transport, is_relay, no_answer

READ_BYTES = 128 * 1024
# iroh gives the end of a connection as text alone.
_CLOSED_BY_PEER = re.compile(
    r"closed by peer: (?:(.*) \(code ([0-9]{1,18})\)|([0-9]{1,18}))", re.DOTALL
)
_IROH_DIAL_SECONDS = 30.0  # after which it gives up by itself
_BIND_SECONDS = 10.0
_CLOSE_SECONDS = 5.0  # it waits until the peers have acknowledged, and some may be gone
_RELAY_CHOICE_SECONDS = 5.0  # for iroh to choose the nearest of several relays
_WRONG_KEY = "invalid peer certificate"

log = logging.getLogger(__name__)
iroh_bindings.apply_fixes()


class IrohPipe:
    def __init__(self, connection: IrohConnection, stream: iroh.BiStream) -> None:
        self._connection = connection
        self._send = stream.send()
        self._receive = stream.recv()

    async def read(self) -> bytes:
        try:
            data: bytes = await self._receive.read(READ_BYTES)
        except IrohError as error:
            raise self._connection.lost() from error
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._send.write_all(data)
        except IrohError as error:
            raise self._connection.lost() from error

    async def finish(self) -> None:
        try:
            await self._send.finish()
        except IrohError as error:
            raise self._connection.lost() from error

    def reset(self) -> None:
        self._connection.spawn(self._reset())

    async def _reset(self) -> None:
        for stop in (self._send.reset, self._receive.stop):
            try:
                await stop(0)
            except IrohError:  # it has ended already, or the link has
                continue


class IrohConnection:
    def __init__(self, connection: iroh.Connection) -> None:
        self.peer = NODE_PREFIX + connection.remote_id().to_bytes().hex()
        self._connection = connection
        self._why: LinkLost | None = None
        self._tasks = TaskSet()
        self.spawn = self._tasks.spawn
        self._ended = asyncio.Event()
        self._spare: asyncio.Future[iroh.BiStream] | None = None
        # Windows stay as they are: that of the whole link is unlimited, and cannot be made smaller.
        connection.set_max_concurrent_bi_streams(wire.MAX_STREAMS)
        connection.set_max_concurrent_uni_streams(0)
        self.spawn(self._watch())

    async def open(self) -> IrohPipe:
        if (lost := self._close_reason()) is not None:
            raise lost
        spare, self._spare = self._spare or self._open(), None
        try:
            pipe = IrohPipe(self, await asyncio.shield(spare))
        except IrohError as error:
            raise self.lost() from error
        except asyncio.CancelledError:
            self._spare = self._spare or spare
            raise
        self._spare = self._spare or self._open()
        return pipe

    def _open(self) -> asyncio.Future[iroh.BiStream]:
        """Open the next stream ahead of time: the peer sees it with its first byte."""
        opening: asyncio.Future[iroh.BiStream]
        opening = asyncio.ensure_future(self._connection.open_bi())
        opening.add_done_callback(ignore_exception)
        return opening

    async def accept(self) -> IrohPipe:
        try:
            return IrohPipe(self, await self._connection.accept_bi())
        except IrohError as error:
            raise self.lost() from error

    def send_heartbeat(self) -> None:
        try:
            self._connection.send_datagram(wire.BEAT)
        except IrohError as error:
            self._log_failed_heartbeat("sent to", error)

    async def receive_heartbeat(self) -> None:
        try:
            await self._connection.read_datagram()
        except IrohError as error:
            self._log_failed_heartbeat("read from", error)
            raise self.lost() from error

    def _log_failed_heartbeat(self, action: str, error: IrohError) -> None:
        if self._close_reason() is None:  # else `closed` says why
            name = wire.short(self.peer)
            log.warning("no heartbeat could be %s %s: %s", action, name, error.message())

    def received_bytes(self) -> int:
        return self._connection.stats().udp_rx_bytes  # type: ignore[no-any-return]

    def close(self, why: LinkLost) -> None:
        if self._close_reason() is None:
            self._why = why
            self._connection.close(int(why.code or 0), wire.cut(why.reason))
            self._ended.set()

    async def _watch(self) -> None:
        await self._connection.closed()
        self._ended.set()

    async def closed(self) -> LinkLost:
        await self._ended.wait()
        return self.lost()

    def route(self) -> LinkView:
        for path in self._connection.paths():
            if path.is_selected:
                return LinkView(path.is_ip, path.remote_addr, float(path.rtt_ms))
        return LinkView(direct=False, address="", rtt_ms=None)

    def lost(self) -> LinkLost:
        """Return why a call failed: the link has ended, or else the stream alone."""
        message = f"{wire.short(self.peer)} abandoned the stream."
        return self._close_reason() or LinkLost(message)

    def _close_reason(self) -> LinkLost | None:
        if self._why is None and (text := self._connection.close_reason()) is not None:
            self._why = _link_lost(self.peer, text)
        return self._why


def _link_lost(peer: str, text: str) -> LinkLost:
    if match := _CLOSED_BY_PEER.fullmatch(text):
        code, reason = int(match[2] or match[3]), wire.printable(match[1] or "")
        sentence = reason or f"it gave no reason (code {code})"
        return LinkLost(
            f"{wire.short(peer)} closed the link: {sentence.rstrip('.')}.", code=code, reason=reason
        )
    return LinkLost(f"The link to {wire.short(peer)} is lost: {text}.")


class IrohTransport(Transport):
    """A transport over QUIC; made by `await IrohTransport.bind(...)`."""

    def __init__(
        self, endpoint: iroh.Endpoint, options: LinkOptions | None, relays: Sequence[str]
    ) -> None:
        """`relays`: URLs, of which iroh chooses one."""
        super().__init__(NODE_PREFIX + endpoint.id().to_bytes().hex(), options)
        self._endpoint, self._relays = endpoint, relays
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def bind(
        cls,
        identity: Identity,
        host: str,
        port: int,
        relay: str = "none",
        options: LinkOptions | None = None,
    ) -> IrohTransport:
        """Listen on an IP address of this machine; `port` 0 is any free one, `relay` "none", "n0"
        (the public ones of iroh's makers) or a relay's URL.  Raises CliError if that fails."""
        relays = _relay_mode(relay)
        builder = iroh.EndpointBuilder()
        builder.apply_minimal()  # other presets publish our address to a public DNS
        builder.secret_key(identity.signing_key.encode())
        builder.alpns([wire.NAME.encode()])
        builder.relay_mode(relays)
        try:
            for address in _sockets(host, port):
                builder.bind_addr(address)
            endpoint = await asyncio.wait_for(builder.bind(), _BIND_SECONDS)
        except (IrohError, TimeoutError) as error:
            why = error.message() if isinstance(error, IrohError) else "no answer"
            raise CliError(
                f"Peering cannot use UDP port {port} of {host} ({why}): another program may have "
                "it, or the address is not this machine's; choose others."
            ) from error
        return cls(endpoint, options, relays.relay_map().urls())

    def addresses(self) -> list[str]:
        here = self._endpoint.addr()
        # iroh says so only once the relay has answered, seconds later; a ticket is made sooner.
        relay = self._relays[0] if len(self._relays) == 1 else here.relay_url()
        direct = here.direct_addresses()
        elsewhere = [address for address in direct if not _is_loopback(address)]
        return [*(elsewhere or direct), *([relay] if relay else [])]

    async def wait_for_addresses(self) -> None:
        if len(self._relays) > 1:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._endpoint.online(), _RELAY_CHOICE_SECONDS)

    async def dial(self, node_id: str, addresses: Sequence[str]) -> IrohConnection:
        try:
            key = iroh.EndpointId.from_bytes(bytes.fromhex(node_id.removeprefix(NODE_PREFIX)))
        except (ValueError, IrohError) as error:
            raise Unreachable(
                f"'{node_id}' is not a node id: compare it with the ticket."
            ) from error
        relay, direct = await _resolve(addresses)
        if not direct and not self._relays:
            raise Unreachable(
                f"{wire.short(node_id)} is known by its relay {relay} alone, and this box uses "
                "none: set [peering] relay here too."
            )
        try:
            where = iroh.EndpointAddr(key, relay, direct)
            return IrohConnection(await self._endpoint.connect(where, wire.NAME.encode()))
        except IrohError as error:
            raise _explain_failure(node_id, addresses, error.message()) from error

    async def _listen(self) -> None:
        while (incoming := await self._endpoint.accept_next()) is not None:
            if self.make_room():
                self.upgrade_inbound(partial(self._accept_connection, incoming))
            else:
                with suppress(IrohError, TimeoutError):
                    await asyncio.wait_for(incoming.refuse(), _CLOSE_SECONDS)

    async def _accept_connection(self, incoming: iroh.Incoming) -> IrohConnection:
        try:
            return IrohConnection(await (await incoming.accept()).connect())
        except IrohError as error:
            raise Unreachable(f"A handshake failed: {_last_line(error.message())}.") from error

    async def close(self) -> None:
        await super().close()
        with suppress(IrohError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._endpoint.close()
                await self._listening
        self._listening.cancel()


def _relay_mode(relay: str) -> iroh.RelayMode:
    """Return iroh's setting for `[peering] relay`.  Raises CliError."""
    if relay == "none":
        return iroh.RelayMode.disabled()
    if relay == "n0":
        return iroh.RelayMode.default_mode()
    try:
        return iroh.RelayMode.custom_from_urls([relay])
    except IrohError as error:
        raise CliError(
            f"[peering] relay is '{relay}', which is not a URL: write https://HOST or "
            "https://HOST:PORT."
        ) from error


def _sockets(host: str, port: int) -> list[str]:
    """Return the addresses to bind: the host, and one of the other IP version.

    iroh binds all addresses of a version that is not bound, on any port: so that of the other
    version is loopback, where it does no harm.
    """
    address = ipaddress.ip_address(host)
    unspecified = address.is_unspecified
    if address.version == 6:
        return [f"[{host}]:{port}", f"{'0.0.0.0' if unspecified else '127.0.0.1'}:{port}"]  # noqa: S104
    return [f"{host}:{port}", *([f"[{'::' if unspecified else '::1'}]:{port}"] * has_ipv6())]


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback address."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(host_and_port(address)[0]).is_loopback


async def _resolve(addresses: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the first relay's URL and the numeric addresses; names are looked up.  Raises
    Unreachable."""
    relay: str | None = None
    direct: list[str] = []
    failures: list[str] = []
    for address in addresses:
        if is_relay(address):
            relay = relay or address
            continue
        try:
            host, port = host_and_port(address)
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except (ValueError, OSError) as error:
            failures.append(f"{address}: {error}")
            continue
        for family, *_, sockaddr in infos:
            text = str(sockaddr[0])
            direct.append(f"[{text}]:{port}" if family == socket.AF_INET6 else f"{text}:{port}")
    if relay is None and not direct:
        why = "; ".join(failures) or "none is known"
        raise Unreachable(f"There is no address to connect to ({why}).")
    return relay, list(dict.fromkeys(direct))


def _explain_failure(
    node_id: str, addresses: Sequence[str], message: str
) -> Unreachable | WrongPeer:
    name, where, why = wire.short(node_id), ", ".join(addresses), _last_line(message)
    if _WRONG_KEY in why and "aborted by peer" not in why:
        return WrongPeer(
            f"{WrongPeer.beginning}{name} answers at {where}: it has moved, or somebody is in its "
            "place; ask its operator for a new ticket."
        )
    if "known protocol" in why:
        return Unreachable(
            f"{name} answers at {where}, but does not speak {wire.NAME}: update the older of the "
            "two boxes."
        )
    if why == "timed out":
        return no_answer(node_id, addresses, _IROH_DIAL_SECONDS)
    return Unreachable(f"{name} cannot be reached at {where}: {why}.")


def _last_line(message: str) -> str:
    """Return the last line of a message of iroh's, without the place in its source."""
    return re.sub(rf" \(/\S+\){END}", "", message.strip().splitlines()[-1].strip()).rstrip(".")
