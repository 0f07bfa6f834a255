"""Hypercorn around the app: the socket, the signals, the way down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import termios
from collections.abc import Callable

from hypercorn.asyncio import run as hypercorn_run
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.asyncio import tcp_server
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData

from pinaivu_box.box import Box
from pinaivu_box.errors import CliError
from pinaivu_box.server.app import create_app

log = logging.getLogger("pinaivu.serve")

# Seconds.  The executable's loader passes signals on to us: Ctrl-C, which reaches the whole process
# group, then comes twice.
_ONE_SIGNAL = 0.3
_LINGER_SECONDS = 2.0  # that a client may go on sending after our last word


class _Connection(tcp_server.TCPServer):
    """Hypercorn's, without the wait for the idle timeout once the client has closed: a thousand
    short connections would otherwise hold every file descriptor for that long.

    And one that we close is read from until the client has closed it too, or for a moment: closed
    with something unread it would be reset, and the client might never see our answer.
    """

    _closing = False
    _running: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._running = asyncio.current_task()
        # Cut off when the box stops; before Python 3.12, asyncio prints what leaves here.
        with contextlib.suppress(asyncio.CancelledError):
            await super().run()

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, Closed):
            await super().protocol_send(event)
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


hypercorn_run.TCPServer = _Connection  # type: ignore[attr-defined]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; CliError in one sentence if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        raise CliError(_why_not(host, port, error)) from error
    return listener


def _why_not(host: str, port: int, error: OSError | OverflowError) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"The address {host}:{port} is in use: stop what is there, or choose another --port."
    if code == errno.EACCES:
        return f"Port {port} needs privileges that this user has not: choose one above 1023."
    reason = getattr(error, "strerror", None) or error
    return f"The address {host}:{port} cannot be listened on: {reason}."


async def serve(
    box: Box,
    listener: socket.socket,
    started: Callable[[], None],
    stopping_with: Callable[[int], None] = lambda running: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.  A second signal ends the process at once.

    `started` is called once it listens, `stopping_with` at the signal, with the number of requests
    that are waited for.
    """
    stopping = asyncio.Event()
    _on_signals(stopping, box)
    config = HypercornConfig()
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
    stop = asyncio.create_task(stopping.wait())
    started()
    await asyncio.wait({server, stop}, return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        stopping_with(box.requests.count)
        # Still listening, so that new requests get a 503 and not a refused connection.
        await box.drain()
        drained.set()
    stop.cancel()
    try:
        await server
    finally:
        await app.state.background.ended()
        app.state.bodies.close()


def _on_signals(stopping: asyncio.Event, box: Box) -> None:
    loop = asyncio.get_running_loop()
    first = 0.0

    def stop(number: int) -> None:
        nonlocal first
        if not stopping.is_set():
            first = loop.time()
            stopping.set()
        elif loop.time() - first > _ONE_SIGNAL:
            os._exit(128 + number)

    def hang_up() -> None:
        if terminal and not _has_terminal():
            stop(signal.SIGHUP)  # its window was closed
        else:
            task = loop.create_task(_reload(box))
            reloading.add(task)
            task.add_done_callback(reloading.discard)

    terminal = _has_terminal()
    reloading: set[asyncio.Task[None]] = set()  # asyncio itself would forget them
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def _has_terminal() -> bool:
    """Whether standard error is one that is still there."""
    try:
        termios.tcgetattr(2)
    except termios.error:
        return False
    return True


async def _reload(box: Box) -> None:
    try:
        done = await box.reload()
    except CliError as error:
        log.error("not reloaded: %s", error.message)
    else:
        fields = dataclasses.asdict(done) | {"not_served": len(done.not_served)}
        log.info("reloaded", extra={"fields": fields})
