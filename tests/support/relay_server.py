"""A relay as iroh's endpoints know it (`iroh-relay-v2`), for tests alone: it believes every key.

Clients come by a websocket at `/relay`; each message is one frame, whose first byte is its kind.
What goes to another client begins with that one's key, and arrives with the sender's in its place.
`tests.support.relay_server HOST PORT` prints its URL.  `GET /seen` says who is there and how much
was relayed, `GET /has/HEX` whether these bytes were in it; `GET /hold/SECONDS/SHARE` makes it hold
each datagram back for so long, and lose this share.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import defaultdict
from contextlib import suppress

from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Request
from wsproto.events import Ping as WebsocketPing
from wsproto.utilities import RemoteProtocolError

CHALLENGE, AUTH, CONFIRMS, DENIES = 0, 1, 2, 3
SEND, SEND_MANY, GIVE = 4, 5, 6
GONE, PING, PONG, STATUS = 8, 9, 10, 13
SAME_KEY = 1  # a status: another client came with this key, and gets everything from now on
KEY, SIGNATURE = 32, 64
PROTOCOLS = ("iroh-relay-v2", "iroh-relay-v1")


class Client:
    """One websocket.  `key` is what it says to be, once it has answered the challenge."""

    def __init__(self, relay: Relay, writer: asyncio.StreamWriter) -> None:
        self.key = b""
        self._relay, self._writer = relay, writer
        self._ws = WSConnection(ConnectionType.SERVER)
        self._message = b""

    async def talk(self, reader: asyncio.StreamReader, head: bytes) -> None:
        self._feed(head)
        while data := await reader.read(65536):
            self._feed(data)
            await self._writer.drain()

    def send(self, kind: int, *parts: bytes) -> None:
        if self._ws.state is ConnectionState.OPEN:
            message = BytesMessage(b"".join((bytes([kind]), *parts)))
            self._writer.write(self._ws.send(message))

    def _feed(self, data: bytes) -> None:
        self._ws.receive_data(data)
        for event in self._ws.events():
            if isinstance(event, Request):
                spoken = next(one for one in PROTOCOLS if one in event.subprotocols)
                self._writer.write(self._ws.send(AcceptConnection(subprotocol=spoken)))
                self.send(CHALLENGE, os.urandom(16))
            elif isinstance(event, BytesMessage):
                self._message += bytes(event.data)
                if event.message_finished:
                    message, self._message = self._message, b""
                    self._take(message[0], message[1:])
            elif isinstance(event, CloseConnection | WebsocketPing):
                self._writer.write(self._ws.send(event.response()))

    def _take(self, kind: int, body: bytes) -> None:
        if kind == AUTH and len(body) == KEY + 1 + SIGNATURE and not self.key:
            self.key = body[:KEY]
            self.send(CONFIRMS)
            self._relay.arrived(self)
        elif not self.key:
            self.send(DENIES, b"\x09no answer")
            self._writer.close()
        elif kind == PING:
            self.send(PONG, body)
        elif kind in (SEND, SEND_MANY):
            there, mark, rest = body[:KEY], body[KEY : KEY + 1], body[KEY + 1 :]
            size = len(rest)
            if kind == SEND_MANY:
                size, rest = int.from_bytes(rest[:2], "big"), rest[2:]
            for start in range(0, len(rest), size):
                self._relay.pass_on(self.key, there, mark + rest[start : start + size])


class Relay:
    """`held` seconds is each datagram kept, and `lost` is the share that never arrives."""

    def __init__(self) -> None:
        self.held = self.lost = 0.0
        self.clients: dict[bytes, Client] = {}
        self.relayed = bytearray()  # with the keys of who sent it, and to whom
        self._known_to: defaultdict[bytes, set[bytes]] = defaultdict(set)
        self._dice = random.Random(1)
        self._visits: set[asyncio.Task[None]] = set()

    async def serve(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._visited, host, port)
        self.url = f"http://{host}:{self._server.sockets[0].getsockname()[1]}/"

    async def close(self) -> None:
        self._server.close()
        for visit in self._visits:
            visit.cancel()
        await asyncio.gather(*self._visits, return_exceptions=True)

    async def _visited(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visit = asyncio.current_task()
        assert visit is not None
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)
        try:
            await self._visit(reader, writer)
        finally:
            writer.transport.abort()

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(self, writer)
        with suppress(OSError, EOFError, RemoteProtocolError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /relay"):
                await client.talk(reader, head)
            else:
                body = self._answer(head.split()[1].decode())
                length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(b"HTTP/1.1 200 OK\r\n" + length.encode() + body)
                await writer.drain()
        with suppress(OSError):  # what was written arrives before the connection is aborted
            writer.close()
            await writer.wait_closed()
        if self.clients.get(client.key) is client:
            del self.clients[client.key]
            for one in self._known_to.pop(client.key, set()) & self.clients.keys():
                self.clients[one].send(GONE, client.key)

    def arrived(self, client: Client) -> None:
        if before := self.clients.get(client.key):
            before.send(STATUS, bytes([SAME_KEY]))
        self.clients[client.key] = client

    def pass_on(self, sender: bytes, there: bytes, datagram: bytes) -> None:
        if there not in self.clients or self._dice.random() < self.lost:
            return
        self._known_to[sender].add(there)
        self.relayed += sender + there + datagram
        asyncio.get_running_loop().call_later(self.held, self._give, sender, there, datagram)

    def _give(self, sender: bytes, there: bytes, datagram: bytes) -> None:
        if client := self.clients.get(there):
            client.send(GIVE, sender, datagram)

    def _answer(self, path: str) -> bytes:
        """To all but websockets.  Clients measure their way here by `/ping`: 200 is enough."""
        if path.startswith("/hold/"):
            self.held, self.lost = map(float, path.split("/")[2:])
        if path.startswith("/has/"):
            return json.dumps(bytes.fromhex(path[5:]) in self.relayed).encode()
        if path != "/seen":
            return b""
        here = [key.hex() for key in self.clients]
        return json.dumps({"clients": here, "relayed": len(self.relayed)}).encode()


async def main(host: str, port: str) -> None:
    relay = Relay()
    await relay.serve(host, int(port))
    print(relay.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
