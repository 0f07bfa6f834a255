"""The other side of the tests: `tests.support.echo_peer HOST SEED PORT [NODE_ID ADDRESS...]`.

Serves conversations that begin with a command, and prints what happens as JSON lines.  With a node
to connect to, it first has one short conversation with it.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from nacl.signing import SigningKey

from pinaivu_box.errors import PeeringError
from pinaivu_box.identity import Identity
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.link import Link, Stream
from pinaivu_box.transport.transport import Transport

Tell = Callable[..., None]


async def serve(transport: Transport, tell: Tell) -> None:
    while True:
        try:
            link = await transport.accept()
        except PeeringError:
            return
        tell("link", peer=link.peer, software=link.software)
        await spawn(serve_link(link, tell))


_tasks: set[asyncio.Task[None]] = set()


async def spawn(work: Any) -> None:
    task = asyncio.create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def serve_link(link: Link, tell: Tell) -> None:
    try:
        while True:
            await spawn(serve_stream(link, await link.accept(), tell))
    except PeeringError:
        lost = await link.closed()
        tell("closed", peer=link.peer, message=lost.message, code=lost.code, reason=lost.reason)


async def serve_stream(link: Link, stream: Stream, tell: Tell) -> None:
    try:
        name, *arguments = (await stream.receive() or b"").decode().split(" ", 2)
        await COMMANDS[name](link, stream, *arguments)
    except PeeringError as error:
        tell("stream", peer=link.peer, kind=type(error).__name__, message=error.message)


async def echo(link: Link, stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)
    await stream.finish()


async def sink(link: Link, stream: Stream) -> None:
    digest, size = hashlib.sha256(), 0
    while (frame := await stream.receive()) is not None:
        digest.update(frame)
        size += len(frame)
    await stream.send(json.dumps([size, digest.hexdigest()]).encode())
    await stream.finish()


async def source(link: Link, stream: Stream, frames: str) -> None:
    for number in range(int(frames)):
        await stream.send(number.to_bytes(4, "big") * (1024 * 256))
    await stream.finish()
    await stream.receive()


async def leave(link: Link, stream: Stream) -> None:
    """Answer one frame, then abandon."""
    frame = await stream.receive()
    assert frame is not None
    await stream.send(frame)
    await stream.receive()  # the other side says when it has read that
    stream.abandon()


async def stall(link: Link, stream: Stream) -> None:
    await link.closed()
    await stream.receive()


async def call_back(link: Link, stream: Stream, count: str) -> None:
    """Open streams to the caller, each with its number in it."""
    for number in range(int(count)):
        back = await link.open()
        await back.send(str(number).encode())
        await back.finish()
        await back.receive()
    await stream.finish()
    await stream.receive()


async def litter(link: Link, stream: Stream) -> None:
    """Echo, and leave each stream for a garbage collector that runs often."""
    gc.set_threshold(10)
    stream.itself = stream  # type: ignore[attr-defined]
    await echo(link, stream)


async def block(link: Link, stream: Stream, seconds: str) -> None:
    """Stand still, with all the process's coroutines."""
    time.sleep(float(seconds))  # noqa: ASYNC251
    await stream.finish()
    await stream.receive()


async def close(link: Link, stream: Stream, code: str, reason: str) -> None:
    await link.close(int(code), reason)


COMMANDS: dict[str, Any] = {
    "echo": echo,
    "sink": sink,
    "source": source,
    "leave": leave,
    "stall": stall,
    "call_back": call_back,
    "litter": litter,
    "block": block,
    "close": close,
}


async def main(host: str, seed: str, port: str, *known: str) -> None:
    def tell(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), flush=True)

    identity = Identity(SigningKey(bytes.fromhex(seed)))
    transport = await IrohTransport.bind(identity, host, int(port))
    tell("listening", node_id=transport.node_id, addresses=transport.addresses())
    if known:
        link = await transport.connect(known[0], known[1:], 20)
        stream = await link.open()
        await stream.send(b"echo")
        await stream.send(b"hello")
        tell(
            "echoed",
            text=(await stream.receive() or b"").decode(),
            route=link.route().address,
        )
        await stream.finish()
        await spawn(serve_link(link, tell))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await spawn(serve(transport, tell))
    await stopped.wait()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
