"""HTTP to one upstream, and what its failures mean.

What it answers is bounded in every direction.  Its key is sent to its base URL and nowhere else:
redirects are not followed.  Nothing of a request, of an answer or of the key is in a log.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any

import httpx
import msgspec

import pinaivu_box
from pinaivu_box import http_body
from pinaivu_box.errors import (
    ApiError,
    BadRequest,
    ContextOverflow,
    NoNodesAvailable,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamLost,
    quoted,
)
from pinaivu_box.secret import Secret
from pinaivu_box.text import number
from pinaivu_box.tracing.context import HEADER, TraceContext
from pinaivu_box.upstream_config import UpstreamConfig

log = logging.getLogger("pinaivu.upstream")

_MAX_LINE_BYTES = 4 * 1024 * 1024
_MAX_ERROR_BYTES = 65_536
_MAX_DOCUMENT_BYTES = 256 * 1024 * 1024  # the vectors of 2048 texts
_WRITE_SECONDS = 60.0
_MAX_RETRY_SECONDS = 3600
_ITS_FAULT = (402, 408)  # of the server, or of how it is paid for
_NOT_THERE = (404, 405, 501)  # embeddings of a model that makes none, for example
_OVERFLOW_TYPES = ("context_length_exceeded", "exceed_context_size_error")
_OVERFLOW_WORDS = ("maximum context length", "context length is only", "context size")
_EVENT_STREAM = "text/event-stream"
_DONE = b"[DONE]"


class UpstreamClient:
    def __init__(self, config: UpstreamConfig, key: Secret | None) -> None:
        self.name, self._config, self._key = config.name, config, key
        self._base = config.url.rstrip("/")
        self._told = 0  # the status of its last failure
        headers = {
            "User-Agent": f"pinaivu-box/{pinaivu_box.__version__}",
            "Accept-Encoding": "identity",
        }
        if key is not None:
            headers["Authorization"] = f"Bearer {key.reveal()}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=config.connect_seconds, write=_WRITE_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def models(self, seconds: float) -> bytes:
        """The document that lists them.  Raises ApiError, TimeoutError."""
        return await self._get(f"{self._base}/models", seconds)

    async def check_health(self, seconds: float) -> None:
        """Ask `/health` beside the base URL, as vLLM and llama-server have it.  Raises ApiError,
        TimeoutError."""
        await self._get(str(httpx.URL(self._base).join("health")), seconds)

    async def _get(self, url: str, seconds: float) -> bytes:
        async with asyncio.timeout(seconds), self._open("GET", url) as response:
            return await _whole(response, _MAX_DOCUMENT_BYTES)

    @asynccontextmanager
    async def ask(
        self, path: str, body: dict[str, Any], trace: TraceContext | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request, which belongs to the span `trace`; its answer is the data of each event
        of a stream, or one document if it is none.  Leaving ends it.  Raises ApiError, as does what
        it yields."""
        content = msgspec.json.encode(body)
        headers = {HEADER: trace.header} if trace is not None else {}
        async with self._open("POST", self._base + path, content, headers) as response:
            if response.headers.get("Content-Type", "").startswith(_EVENT_STREAM):
                yield self._events(response)
            else:
                yield _once(response)

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        url: str,
        content: bytes | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncIterator[httpx.Response]:
        if content is not None:
            headers = {**headers, "Content-Type": "application/json"}
        request = self._http.build_request(method, url, content=content, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise self._failure(response, await _read_error(response))
                self._told = 0
                yield response
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self.lost(_reason(error)) from None

    async def _events(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The data of each event up to the end of the stream or `[DONE]`; comments are passed over.

        Nobody sends data in several lines, so each line is taken as an event of its own."""
        rest, total = bytearray(), 0
        async for part in response.aiter_bytes():
            rest += part
            total += len(part)
            if total > _MAX_DOCUMENT_BYTES:
                raise self.lost(f"sent more than {_MAX_DOCUMENT_BYTES} bytes")
            if len(rest) > _MAX_LINE_BYTES + len(part):
                raise self.lost(f"sent a line of more than {_MAX_LINE_BYTES} bytes")
            if b"\n" not in part:
                continue
            *lines, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in lines:
                if (data := _data(line)) == _DONE:
                    return
                if data:
                    yield data
        if (data := _data(bytes(rest))) not in (b"", _DONE):
            yield data

    # -- failures ----------------------------------------------------------------------------------

    def lost(self, what: str, kind: type[UpstreamLost] = UpstreamLost) -> UpstreamLost:
        """The error for what it has done wrong, the end of a sentence."""
        return kind(f"The upstream {self.name} {what}: try again later.", retry_after=2)

    def _failure(self, response: httpx.Response, answer: _ErrorAnswer) -> ApiError:
        status = response.status_code
        if status in (401, 403):
            self._tell(status, "it refuses its key: check key_env or key_file")
            return self.lost("refuses this box, as the log of this box says")
        if status == 429 or (status == 503 and "Retry-After" in response.headers):
            wait = _retry_after(response.headers.get("Retry-After", ""))
            return UpstreamBusy(
                f"The upstream {self.name} has no room ({status}): try again in {wait} s.",
                retry_after=wait,
            )
        if status in _NOT_THERE:
            self._tell(status, "it has no such model, or path")
            return NoNodesAvailable(f"The upstream {self.name} does not serve this ({status}).")
        if status >= 500 or status < 400 or status in _ITS_FAULT:
            self._tell(status, "it failed")
            return self.lost(
                f"answered {status}", UpstreamFailed if status == 500 else UpstreamLost
            )
        message = self._without_key(answer.message) or f"it answered {status}"
        if answer.is_overflow:
            return ContextOverflow(message)
        return BadRequest(
            f"The upstream {self.name} does not take this request: {message}",
            param=self._without_key(answer.param) if answer.param else None,
        )

    def _tell(self, status: int, what: str) -> None:
        """The operator; once, until it answers well or otherwise: it is asked time and again."""
        if status != self._told:
            log.warning("upstream %s answered %d: %s", self.name, status, what)
        self._told = status

    def _without_key(self, text: str) -> str:
        """Nothing that it says may hold the key."""
        if self._key is not None:
            text = text.replace(self._key.reveal(), "***")
        return quoted(text, 1000)


class _ErrorAnswer(msgspec.Struct):
    """What an answer says about its failure: vLLM's older form has the fields of `error` beside
    it."""

    message: str = ""
    kind: str = ""
    param: str | None = None

    @property
    def is_overflow(self) -> bool:
        words = self.message.lower()
        return self.kind in _OVERFLOW_TYPES or any(part in words for part in _OVERFLOW_WORDS)


async def _read_error(response: httpx.Response) -> _ErrorAnswer:
    try:
        async with asyncio.timeout(_WRITE_SECONDS):
            body: Any = msgspec.json.decode(await _whole(response, _MAX_ERROR_BYTES))
    except (TimeoutError, ValueError, RecursionError, ApiError, httpx.HTTPError):
        return _ErrorAnswer()
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, str):
        return _ErrorAnswer(error)
    if not isinstance(error, dict):
        return _ErrorAnswer()
    codes = [error.get("code"), error.get("type")]
    kind = next((code for code in codes if code in _OVERFLOW_TYPES), "")
    param = error.get("param")
    return _ErrorAnswer(
        str(error.get("message") or ""), kind, param if isinstance(param, str) else None
    )


def _data(line: bytes) -> bytes:
    return line[5:].strip() if line.startswith(b"data:") else b""


async def _whole(response: httpx.Response, most: int) -> bytes:
    data = await http_body.read(response, most)
    if data is None:
        raise httpx.DecodingError(f"sent more than {most} bytes")
    return data


async def _once(response: httpx.Response) -> AsyncIterator[bytes]:
    yield await _whole(response, _MAX_DOCUMENT_BYTES)


def _reason(error: Exception) -> str:
    """Why nothing, or no more, came of it.  Without the words of the library where they could hold
    what was sent."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return "cannot be reached"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "cut the connection"
        case httpx.DecodingError():
            return str(error)
        case _:
            return f"could not be asked ({type(error).__name__})"


def _retry_after(text: str) -> int:
    """Seconds, which may be given as a date; 1 if nothing is."""
    seconds: float | None = number(text.strip())
    if seconds is None:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            seconds = 1
    return max(1, min(math.ceil(seconds), _MAX_RETRY_SECONDS))
