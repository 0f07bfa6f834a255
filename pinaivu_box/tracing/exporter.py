"""Sends spans to the collector, off the path of requests: a bounded queue, batches, and retries.

What does not fit into the queue, and what the collector does not take, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import msgspec

from pinaivu_box import backoff, http_body
from pinaivu_box.text import number
from pinaivu_box.tracing.span import Span, Value, export_request

if TYPE_CHECKING:
    import httpx  # loaded with the first span: most boxes have no collector

log = logging.getLogger("pinaivu.tracing")

MAX_QUEUED = 4096  # about 8 MB
MAX_BATCH = 128
_BATCH_SECONDS = 1.0  # how long spans are gathered
_TIMEOUT_SECONDS = 10.0
_MAX_ATTEMPTS = 6
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 30.0
_CLOSE_SECONDS = 5.0
_RETRIED = (429, 502, 503, 504)  # as OTLP says
_MAX_ANSWER_BYTES = 65_536

Counted = Callable[[Literal["exported", "dropped"], int], None]


class _Refused(Exception):
    """The collector does not take the batch; `retry_after` in seconds if it may later."""

    def __init__(self, why: str, retry_after: float | None) -> None:
        super().__init__(why)
        self.why, self.retry_after = why, retry_after


class _PartialSuccess(msgspec.Struct):
    rejectedSpans: int | str = 0  # noqa: N815
    errorMessage: str = ""  # noqa: N815


class _ExportAnswer(msgspec.Struct):
    partialSuccess: _PartialSuccess | None = None  # noqa: N815


class Exporter:
    """`target` says where spans go now: the URL and the headers; None: tracing is off."""

    def __init__(
        self,
        target: Callable[[], tuple[str, dict[str, str]] | None],
        resource: Mapping[str, Value | None],
        counted: Counted,
    ) -> None:
        self._target, self._resource, self._counted = target, resource, counted
        self._queue: list[Span] = []
        self._something = asyncio.Event()
        self._full = asyncio.Event()  # a batch
        self._closing = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._failing = False

    def add(self, span: Span) -> None:
        """Send it soon; never waits."""
        if len(self._queue) >= MAX_QUEUED:
            self._counted("dropped", 1)
            return
        self._queue.append(span)
        self._something.set()
        if len(self._queue) >= MAX_BATCH:
            self._full.set()
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        if self._running is None:
            return
        self._closing.set()
        self._something.set()
        await asyncio.wait({self._running}, timeout=_CLOSE_SECONDS)
        if not self._running.done():
            self._running.cancel()
            await asyncio.wait({self._running})
        self._counted("dropped", len(self._queue))
        self._queue.clear()

    async def _run(self) -> None:
        import httpx

        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
            while not (self._closing.is_set() and not self._queue):
                await self._something.wait()
                await _until(_BATCH_SECONDS, self._full, self._closing)
                batch = self._queue[:MAX_BATCH]
                if batch:
                    try:
                        await self._send(client, batch)
                    except Exception:
                        self._counted("dropped", len(batch))
                        log.exception("spans could not be sent")
                    del self._queue[: len(batch)]
                if len(self._queue) < MAX_BATCH:
                    self._full.clear()
                if not self._queue:
                    self._something.clear()

    async def _send(self, client: httpx.AsyncClient, batch: list[Span]) -> None:
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            if (target := self._target()) is None:
                break  # a reload has turned it off
            try:
                content = export_request(self._resource, batch)
                rejected = min(len(batch), await self._post(client, *target, content))
            except _Refused as refusal:
                self._note_failure(refusal.why)
                if refusal.retry_after is None or self._closing.is_set():
                    break
                pause = backoff.delay(attempt, _FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS)
                await _until(max(pause, refusal.retry_after), self._closing)
            else:
                if self._failing:
                    self._failing = False
                    log.info("the collector takes spans again")
                self._counted("exported", len(batch) - rejected)
                self._counted("dropped", rejected)
                return
        self._counted("dropped", len(batch))

    async def _post(
        self, client: httpx.AsyncClient, url: str, headers: dict[str, str], content: bytes
    ) -> int:
        """How many spans were rejected.  Raises _Refused."""
        import httpx

        headers = {**headers, "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(_TIMEOUT_SECONDS),
                client.stream("POST", url, content=content, headers=headers) as answer,
            ):
                body = await http_body.read(answer, _MAX_ANSWER_BYTES) or b""
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise _Refused(f"cannot be reached ({type(error).__name__})", 0.0) from None
        if answer.status_code in _RETRIED:
            wait: float = number(answer.headers.get("Retry-After", "").strip()) or 0
            raise _Refused(f"answered {answer.status_code}", min(wait, _LONGEST_RETRY_SECONDS))
        if not answer.is_success:
            raise _Refused(f"answered {answer.status_code}", None)
        return _rejected(body)

    def _note_failure(self, why: str) -> None:
        """Once, until it works again."""
        if not self._failing:
            log.warning("the collector of [tracing] endpoint %s: spans may be lost", why)
        self._failing = True


def _rejected(body: bytes) -> int:
    with suppress(ValueError, RecursionError):
        partial = msgspec.json.decode(body, type=_ExportAnswer).partialSuccess
        if partial is not None:
            return max(0, int(partial.rejectedSpans))
    return 0


async def _until(seconds: float, *events: asyncio.Event) -> None:
    """Wait so long, or until one of the events."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
