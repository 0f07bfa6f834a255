"""One streamed request, and the times of what happened.

A bare asyncio protocol, so that the client is not what is measured.  httpx takes about 100 us per
chunk, so that a core reaches 10,000 chunks per second, while 64 streams of 250 tokens per second
are 16,000.  This takes about 25 us (a plain asyncio.Protocol twice that, because asyncio allocates
256 KB for it at every read).  Times are taken when bytes arrive, before they are parsed.

What arrives in one read is one arrival, however many tokens it has.  So a server or a network
that bundles tokens shows longer gaps, not gaps of zero between the tokens of a bundle; the mean
number of tokens per arrival is reported next to the gaps.

Every request has its own connection, and its time starts before that is opened.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from typing import TYPE_CHECKING, Any

import msgspec

from pinaivu_box.bench.wire import EventParser, ResponseParser, WireError

if TYPE_CHECKING:
    from pinaivu_box.bench.target import BenchTarget

_MAX_ERROR_BODY_BYTES = 64 * 1024
# Shared by all connections: its content is copied before the next read.
_BUFFER = memoryview(bytearray(64 * 1024))


class StreamDelta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamChoice(msgspec.Struct, gc=False):
    delta: StreamDelta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class StreamUsage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    choices: list[StreamChoice] = []
    usage: StreamUsage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Event).decode


class RequestOutcome(msgspec.Struct):
    """One request.  Times are seconds of the monotonic clock, 0 for what did not happen.

    `arrivals` are the times at which text arrived, `deltas` the pieces of text in each arrival.
    `error` is the kind of the failure, "" if there was none; `detail` is a sentence.
    """

    tenant: int = 0
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = []
    deltas: list[int] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    usage_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""
    detail: str = ""

    @property
    def tokens(self) -> int:
        """The completion tokens that the server reports, or else the number of pieces of text."""
        return sum(self.deltas) if self.usage_tokens is None else self.usage_tokens


class StreamProtocol(asyncio.BufferedProtocol):
    """Sends `message` and fills in `outcome`; `finished` is set at the end, successful or not."""

    def __init__(
        self, message: bytes, outcome: RequestOutcome, finished: asyncio.Future[None]
    ) -> None:
        self._message = message
        self._outcome = outcome
        self._finished = finished
        self._response = ResponseParser()
        self._events = EventParser()
        self._transport: asyncio.Transport
        self._plain: bytes | None = None  # the body, if it is not an event stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._message)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        now = time.monotonic()
        data = _BUFFER[:nbytes].tobytes()
        try:
            before = self._response.status
            body = self._response.feed(data)
            if not before and self._response.status:
                self._begin()
            if self._plain is not None:
                self._plain = (self._plain + body)[:_MAX_ERROR_BODY_BYTES]
            elif body:
                self._take(self._events.feed(body), now)
        except (WireError, msgspec.DecodeError) as error:
            self._end("malformed answer", str(error))
        if self._response.done:
            self._complete()

    def _begin(self) -> None:
        """The head has arrived."""
        kind = self._response.headers.get("content-type", "")
        if self._response.status != 200 or not kind.startswith("text/event-stream"):
            self._plain = b""

    def _take(self, events: list[bytes], now: float) -> None:
        outcome = self._outcome
        pieces = 0
        for data in events:
            if data == b"[DONE]":
                outcome.ended = now
                self._end()
                break
            event = _decode(data)
            for choice in event.choices:
                delta = choice.delta
                if delta and (delta.content or delta.reasoning_content or delta.reasoning):
                    pieces += 1
                if choice.finish_reason:
                    outcome.finish_reason = choice.finish_reason
            if event.usage:
                self._count(event.usage)
            if event.error is not None:
                self._end("error event", _sentence(event.error))
        if pieces:
            outcome.arrivals.append(now)
            outcome.deltas.append(pieces)

    def _count(self, usage: StreamUsage) -> None:
        self._outcome.prompt_tokens = usage.prompt_tokens
        self._outcome.usage_tokens = usage.completion_tokens
        if usage.prompt_tokens_details:
            self._outcome.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0

    def _complete(self) -> None:
        """The whole answer has arrived; a stream with [DONE] has ended before."""
        status = self._response.status
        if self._plain is None:
            self._end("" if self._outcome.finish_reason else "unfinished stream")
        elif status == 200:
            self._end("no event stream", "the server did not stream its answer")
        else:
            self._end(f"http {status}", f"{status}: {_error_text(self._plain)}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response.end():
            self._complete()
        self._end("disconnected", "the server closed the connection before the end")

    def _end(self, error: str = "", detail: str = "") -> None:
        """End the request; only the first call has an effect."""
        if not self._finished.done():
            self._outcome.error, self._outcome.detail = error, detail
            self._outcome.ended = self._outcome.ended or time.monotonic()
            self._finished.set_result(None)
            self._transport.close()


async def stream(
    target: BenchTarget, message: bytes, outcome: RequestOutcome, timeout: float
) -> None:
    """Send a request and wait for its end; failures are in the outcome.  `timeout` in seconds.

    If `started` of the outcome is set, it is kept: the time at which the request was due.
    """
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[None] = loop.create_future()
    protocol = StreamProtocol(message, outcome, finished)
    outcome.started = outcome.started or time.monotonic()
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout):
            transport, _ = await loop.create_connection(
                lambda: protocol, target.host, target.port, ssl=target.tls
            )
            await finished
    except TimeoutError:
        outcome.error, outcome.detail = "timeout", f"no end within {timeout:g} s"
    except ssl.SSLError as error:
        outcome.error, outcome.detail = "tls", f"TLS failed ({error})"
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        outcome.error, outcome.detail = "cannot connect", f"it cannot be reached ({reason})"
    finally:
        outcome.ended = outcome.ended or time.monotonic()
        if transport is not None:
            transport.abort()


def _error_text(body: bytes) -> str:
    try:
        decoded = msgspec.json.decode(body)
        return _sentence(decoded.get("error", decoded))
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError):
        return body.decode(errors="replace").strip()[:200] or "no body"


def _sentence(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error)[:500]
