"""What the service manager that started the box is told: when it serves, that it lives, and what
it does (`systemctl status`).

`READY=1` is sent once a client of the box's own socket gets an answer, and so is each `WATCHDOG=1`:
the request goes through the socket, the event loop, the application and the database.  An answer
that the box is not ready counts as well: a restart neither installs a model nor empties a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import socket
import ssl
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from pinaivu_box.box import Box
from pinaivu_box.server.health import not_ready
from pinaivu_box.systemd.notify import Notifier
from pinaivu_box.tasks import TaskSet

_EXTENSION_SECONDS = 30.0  # that a start or a stop gets each time
_EXTEND_EVERY_SECONDS = 10.0
_MAX_START_SECONDS = 3600.0  # migrating a large database takes minutes
_MAX_CLOSE_SECONDS = 60.0  # after the last request has ended
_STATUS_SECONDS = 5.0
_RETRY_SECONDS = 0.1  # a socket that is not there yet refuses at once
_ANSWER_SECONDS = 30.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
_REQUEST = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_ANSWERED = (b"200", b"503")


class Supervision:
    """An async context manager: from its beginning on the box starts."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._tasks = TaskSet()
        self._box: Box | None = None
        self._not_reloaded = ""
        self._serving = self._stopping = False

    async def __aenter__(self) -> Self:
        if self._notifier:
            self._notifier.status("Starting")
            self._tasks.spawn(self._extend_start())
        if self._notifier.watchdog_seconds:
            faulthandler.enable()  # when the watchdog ends it, the log says where it was
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._tasks.cancel()

    def watch(self, box: Box, listener: socket.socket) -> None:
        """The box serves at that socket, or is about to."""
        self._box = box
        if self._notifier:
            host, port = listener.getsockname()[:2]
            self._tasks.spawn(self._report(_ANY_ADDRESS.get(host, host), port, box.tls is not None))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        self._notifier.reloading()
        self._not_reloaded = ""
        try:
            yield
        finally:
            if self._serving and not self._stopping:
                self._notifier.ready(self._status())

    def not_reloaded(self, reason: str) -> None:
        self._not_reloaded = f"; not reloaded: {reason}"

    def stopping(self, running: int, drain_seconds: float) -> None:
        self._stopping = True
        self._notifier.stopping(f"Stopping: {_counted(running, 'request')} running")
        if self._notifier:
            self._tasks.spawn(self._extend_stop(drain_seconds + _MAX_CLOSE_SECONDS))

    async def _extend_start(self) -> None:
        deadline = time.monotonic() + _MAX_START_SECONDS
        while not self._serving and time.monotonic() < deadline:
            self._notifier.extend_timeout(_EXTENSION_SECONDS)
            await asyncio.sleep(_EXTEND_EVERY_SECONDS)

    async def _extend_stop(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._notifier.extend_timeout(_EXTENSION_SECONDS)
            await asyncio.sleep(_EXTEND_EVERY_SECONDS)

    async def _report(self, host: str, port: int, tls: bool) -> None:
        while not await _answers(host, port, tls):  # noqa: ASYNC110 - nobody else could tell
            await asyncio.sleep(_RETRY_SECONDS)
        self._serving = True
        self._notifier.ready(self._status())
        if self._notifier.watchdog_seconds:
            self._tasks.spawn(self._prove_life(host, port, tls))
        while not self._stopping:
            self._notifier.status(self._status())
            await asyncio.sleep(_STATUS_SECONDS)

    async def _prove_life(self, host: str, port: int, tls: bool) -> None:
        while True:
            if await _answers(host, port, tls):
                self._notifier.alive()
                await asyncio.sleep(self._notifier.watchdog_seconds / 2)
            else:  # one answer that is late is no reason to end what runs
                await asyncio.sleep(_RETRY_SECONDS)

    def _status(self) -> str:
        box = self._box
        assert box is not None
        if reason := not_ready(box):
            return f"Not ready: {reason}{self._not_reloaded}"
        models = _counted(len(box.catalog.models), "model")
        requests = _counted(box.requests.count, "request")
        return f"Serving {models}, {requests} running{self._not_reloaded}"


async def _answers(host: str, port: int, tls: bool) -> bool:
    """Whether a client gets an answer."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            context = _unverified() if tls else None
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(_REQUEST)
                words = (await reader.readline()).split()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):  # ValueError: no line
        return False
    return len(words) > 1 and words[1] in _ANSWERED


def _unverified() -> ssl.SSLContext:
    """For a connection to this very process."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
