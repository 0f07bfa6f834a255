"""Streams what a box would, and does nothing else: what the language and its server take by
themselves.

    python tests/bench/bare_stream.py asyncio|hypercorn MS

A child process writes a frame to a pipe every MS milliseconds, as an engine does, and each running
stream gets one chunk of it, whose bytes are known before: by asyncio's transport, from the very
callback that has read the pipe, or by a bare ASGI application in Hypercorn.  Prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

FRAME = b"x" * 150  # bytes, about as an engine's of one token
CHILD = "import os, sys, time\nwhile True: time.sleep({}); os.write({}, {!r})"
FIELDS = {
    "id": "chatcmpl-00000000-0000-0000-0000-000000000000",
    "request_id": "req_00000000-0000-0000-0000-000000000000",
    "created": 0,
    "model": "m:1",
    "object": "chat.completion.chunk",
    "system_fingerprint": "fp_000000000000",
}
CHOICE = {"delta": {"content": "x"}, "finish_reason": None, "index": 0, "logprobs": None}
CHUNK = b"data: " + json.dumps({**FIELDS, "choices": [CHOICE]}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"


class Steps:
    """Calls what listens at each frame."""

    def __init__(self, milliseconds: float) -> None:
        self.listeners: dict[int, Callable[[], None]] = {}
        self._reader, writer = os.pipe()
        code = CHILD.format(milliseconds / 1000, writer, FRAME)
        self.child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[writer])
        os.close(writer)
        os.set_blocking(self._reader, False)
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def _read(self) -> None:
        os.read(self._reader, 1 << 16)
        for listener in list(self.listeners.values()):
            listener()


async def with_asyncio(listener: socket.socket, steps: Steps) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        left = json.loads(await reader.readexactly(length))["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        transport = writer.transport

        def step() -> None:
            nonlocal left
            transport.write(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
            left -= 1
            if not left:
                del steps.listeners[id(writer)]
                transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))

        steps.listeners[id(writer)] = step

    async with await asyncio.start_server(serve, sock=listener) as server:
        await server.serve_forever()


async def with_hypercorn(listener: socket.socket, steps: Steps) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        stepped = asyncio.Event()
        steps.listeners[id(stepped)] = stepped.set
        for _ in range(json.loads(body)["max_tokens"]):
            await stepped.wait()
            stepped.clear()
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        del steps.listeners[id(stepped)]
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.errorlog = None
    await serve(app, config)


async def main(kind: str, milliseconds: float) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    steps = Steps(milliseconds)
    print(port, flush=True)
    try:
        await {"asyncio": with_asyncio, "hypercorn": with_hypercorn}[kind](listener, steps)
    finally:
        steps.child.kill()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], float(sys.argv[2])))
