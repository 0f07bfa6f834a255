"""Runs the app in Hypercorn: the socket, the signals, the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import termios
from collections.abc import Callable
from typing import Any, cast

from hypercorn.asyncio import run as hypercorn_run
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.asyncio import tcp_server
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData
from hypercorn.typing import AppWrapper

from pinaivu_box.box import Box
from pinaivu_box.errors import CliError
from pinaivu_box.server import http2
from pinaivu_box.server.app import create_app
from pinaivu_box.server.chunks import EXTENSION
from pinaivu_box.server.supervision import Supervision
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.serve")

# Who signals a process and then its group, as timeout(1) does, means one signal: it arrives twice
# within this time.
_SAME_SIGNAL_SECONDS = 0.3
_LINGER_SECONDS = 2.0  # how long a client may go on sending after the end of an answer


class _Config(HypercornConfig):
    """Hypercorn's, with a context for TLS that stays ours, so that a reload can change its
    certificate."""

    tls: ssl.SSLContext | None = None
    ssl_handshake_timeout = 20.0
    # Hypercorn ends an HTTP/2 connection in the middle of its answers after so many requests.
    keep_alive_max_requests = 2**31

    @property
    def ssl_enabled(self) -> bool:
        return self.tls is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self.tls


class _Connection(tcp_server.TCPServer):
    """Hypercorn's connection with four changes.

    It ends as soon as the client has closed it, not at the idle timeout: many short connections
    would keep every file descriptor until then.  After the server has closed it, it is read for a
    moment until the client closes it too: a connection that is closed with unread data is reset,
    and the client might not receive the answer.  Under TLS, which asyncio cannot end in one
    direction only, the end of the answer is its last byte as HTTP counts them.

    Over HTTP/1.1 it is a `chunks.ChunkWriter` of its answers: the further chunks of a body have no
    state that h11 would have to know.

    And whatever ends a connection ends it without a word in the log: anybody can send nonsense.
    """

    written = 0
    _closing = False
    _running: asyncio.Task[None] | None = None

    def __init__(self, app: AppWrapper, *more: Any) -> None:
        super().__init__(cast("AppWrapper", self._serve), *more)
        self._served, self._transport = app, self.writer.transport

    async def _serve(self, scope: Any, *more: Any) -> None:
        if scope["type"] == "http" and scope["http_version"] == "1.1" and scope["method"] != "HEAD":
            scope["extensions"][EXTENSION] = self
        await self._served(scope, *more)

    @property
    def ready(self) -> bool:
        transport = self._transport
        return not (
            self._closing or transport.is_closing() or transport.get_write_buffer_size() > 0
        )

    def write(self, data: bytes) -> None:
        if data:  # a chunk of nothing would be the last
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.written += 1

    async def run(self) -> None:
        self._running = asyncio.current_task()
        # Cancelled when the box stops; before Python 3.12, asyncio prints the exception.
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await super().run()

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, Closed):
            try:
                await super().protocol_send(event)
            except ssl.SSLError:  # hypercorn knows those of plain connections only
                await self.protocol.handle(Closed())
        elif not self._closing:
            self._closing = True
            with contextlib.suppress(NotImplementedError, OSError, RuntimeError):
                self.writer.write_eof()
            if self._running is not None:
                self.loop.call_later(_LINGER_SECONDS, self._running.cancel)

    async def _read_data(self) -> None:
        with contextlib.suppress(OSError):
            while not self.reader.at_eof():
                data = await self.reader.read(tcp_server.MAX_RECV)
                if not self._closing:
                    await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())
        await self.idle_task.stop()


hypercorn_run.TCPServer = _Connection  # type: ignore[assignment, attr-defined]
http2.install()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises CliError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        raise CliError(_bind_error(host, port, error)) from error
    return listener


def _bind_error(host: str, port: int, error: OSError | OverflowError) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"{host}:{port} is in use: stop the other program, or choose another --port."
    if code == errno.EACCES:
        return f"This user may not listen on port {port}: choose a port above 1023."
    reason = getattr(error, "strerror", None) or error
    return f"Listening on {host}:{port} failed: {reason}."


async def serve(
    box: Box,
    listener: socket.socket,
    started: Callable[[], None],
    stopping_with: Callable[[int], None],
    supervision: Supervision,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.  A second signal ends the process at once.

    `started` is called once the box serves, and `stopping_with` at the signal, with the number of
    running requests.
    """
    stopping = asyncio.Event()
    _on_signals(stopping, box, supervision)
    supervision.watch(box, listener)
    config = _Config()
    config.tls = box.tls
    config.bind = [f"fd://{listener.detach()}"]  # Hypercorn closes it
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.graceful_timeout = 3.0
    config.keep_alive_timeout = 75.0
    drained = asyncio.Event()
    app = create_app(box)
    server = asyncio.create_task(
        hypercorn_serve(app, config, shutdown_trigger=drained.wait)  # type: ignore[arg-type]
    )
    stop_signal = asyncio.create_task(stopping.wait())
    started()
    await asyncio.wait({server, stop_signal}, return_when=asyncio.FIRST_COMPLETED)
    if stop_signal.done():
        stopping_with(box.requests.count)
        supervision.stopping(box.requests.count, box.config.server.drain_seconds)
        # Still listening, so that new requests get a 503 and not a refused connection.
        await box.drain()
        drained.set()
    stop_signal.cancel()
    try:
        await server
    finally:
        await app.state.background.shut_down()
        await app.state.answers.shut_down()
        await app.state.idle_work.close()  # answers that end begin some
        app.state.bodies.close()


def _on_signals(stopping: asyncio.Event, box: Box, supervision: Supervision) -> None:
    loop = asyncio.get_running_loop()
    first = 0.0

    def stop(number: int) -> None:
        nonlocal first
        if not stopping.is_set():
            first = loop.time()
            stopping.set()
        elif loop.time() - first > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def hang_up() -> None:
        if terminal and not _has_terminal():
            stop(signal.SIGHUP)  # the terminal window was closed
        else:
            reloading.spawn(_reload(box, supervision))

    terminal = _has_terminal()
    reloading = TaskSet()
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def _has_terminal() -> bool:
    """Whether standard error is a terminal that still exists."""
    try:
        termios.tcgetattr(2)
    except termios.error:
        return False
    return True


async def _reload(box: Box, supervision: Supervision) -> None:
    with supervision.reloading():
        try:
            reloaded = await box.reload()
        except CliError as error:
            log.error("not reloaded: %s", error.message)
            supervision.not_reloaded(error.message)
        else:
            fields = reloaded._asdict() | {"not_served": len(reloaded.not_served)}
            log.info("reloaded", extra={"fields": fields})
