"""Request bodies: read within limits of size, time and memory, and decoded."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from pinaivu_box.errors import (
    BodyTooLarge,
    InvalidJson,
    NoNodesAvailable,
    RateLimited,
    RequestTimeout,
)
from pinaivu_box.openai import chat_markdown, large_bodies
from pinaivu_box.openai.conversations import Portable
from pinaivu_box.openai.decoding import SMALL_BODY_BYTES, decode
from pinaivu_box.sandbox import SandboxLimit, SandboxLimits, SandboxPool
from pinaivu_box.server.codings import coding_of, decoded
from pinaivu_box.text import number

_SILENCE_SECONDS = 30.0  # in the middle of a body
_BODY_SECONDS = 600.0  # for a whole body
# Large bodies in memory at a time, each of the largest size that is accepted.
_MAX_BODIES_PER_ACCOUNT, _MAX_BODIES = 4, 16
_MAX_WAITING_PER_ACCOUNT = 64
_WAIT_SECONDS = 60.0
# For decoding one body.  The worst case of 10 MB takes 2 s and 300 MB on an ordinary machine.
_LIMITS = SandboxLimits(cpu_seconds=20.0, memory_bytes=1024 * 1024 * 1024, wall_seconds=120.0)

Body = TypeVar("Body", bound=msgspec.Struct)


class Bodies:
    """Decodes small bodies at once.  Larger ones reserve memory, which is bounded, and are decoded
    in a child process, one at a time for each account."""

    def __init__(self) -> None:
        self._pool = SandboxPool(large_bodies.ENTRY, limits=_LIMITS, size=2)
        self._memory = BodyMemory()
        # Apart, because a request that waits for this holds the memory of its body.
        self._history_memory = BodyMemory()
        self._image_memory = BodyMemory()
        self._chat_memory = BodyMemory()

    async def receive(
        self, request: Request, account: str, kind: type[Body], max_bytes: int, *, strict: bool
    ) -> tuple[Body, list[str]]:
        """Read and `decode` a body of at most `max_bytes`, decompressed.

        The memory of a large one is reserved until `release_body`.  Raises what `read` and `decode`
        do, and RateLimited, NoNodesAvailable if there is no memory for it.
        """
        data = await self._read(request, account, max_bytes)
        if len(data) <= SMALL_BODY_BYTES:
            return decode(data, kind, strict=strict)
        payload = large_bodies.job(data, kind, strict=strict)
        del data
        return large_bodies.result(await self._run(payload, account), kind)

    async def receive_markdown(self, request: Request, account: str, max_bytes: int) -> Portable:
        """As `receive`, for a chat in Markdown (see `openai.chat_markdown`)."""
        data = await self._read(request, account, max_bytes)
        if len(data) <= SMALL_BODY_BYTES:
            return chat_markdown.read(data)
        answer = await self._run(large_bodies.markdown_job(data), account)
        return msgspec.msgpack.decode(answer, type=Portable)

    async def _read(self, request: Request, account: str, max_bytes: int) -> bytes:
        """The body; the memory of a large one is reserved."""
        reader = BodyReader(request, max_bytes)
        data = await reader.up_to(SMALL_BODY_BYTES)
        if data is None:
            release = await self._memory.reserve(account, reader.max_size, max_bytes)
            request.scope["state"]["release_body"] = release
            data = await reader.whole()
        return data

    async def reserve_history(
        self, request: Request, account: str, size: int, max_bytes: int
    ) -> None:
        """Reserve memory for `size` bytes of stored responses, if that is much; it is released with
        the body.  Raises RateLimited, NoNodesAvailable."""
        if size <= SMALL_BODY_BYTES:
            return
        release = await self._history_memory.reserve(account, min(size, max_bytes), max_bytes)
        _release_with_body(request, release)

    async def reserve_chat(self, account: str, size: int, max_bytes: int) -> Callable[[], None]:
        """Reserve memory for `size` bytes of a stored conversation, which may have `max_bytes`,
        if that is much; returns the function that releases it.  Raises RateLimited,
        NoNodesAvailable."""
        if size <= SMALL_BODY_BYTES:
            return lambda: None
        return await self._chat_memory.reserve(account, min(size, max_bytes), max_bytes)

    async def reserve_chat_of(
        self, request: Request, account: str, size: int, max_bytes: int
    ) -> None:
        """As `reserve_chat`; it is released with the body."""
        _release_with_body(request, await self.reserve_chat(account, size, max_bytes))

    async def reserve_images(self, request: Request, account: str, max_bytes: int) -> None:
        """Reserve memory for images that are still to be fetched; it is released with the body.
        Raises RateLimited, NoNodesAvailable."""
        release = await self._image_memory.reserve(account, max_bytes, max_bytes)
        _release_with_body(request, release)

    async def history(self, account: str, rows: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
        """See `large_bodies.history`."""
        if sum(len(items) + len(body) for items, body in rows) <= SMALL_BODY_BYTES:
            return large_bodies.history(rows)
        answer = await self._run(large_bodies.history_job(rows), account)
        return msgspec.msgpack.decode(answer, type=list[dict[str, Any]])

    async def _run(self, payload: bytes, account: str) -> bytes:
        try:
            return await self._pool.run_async(payload, tenant=account)
        except SandboxLimit as error:
            raise BodyTooLarge(
                "Decoding the body takes too much time or memory: simplify it, or send several "
                "requests."
            ) from error

    def close(self) -> None:
        self._pool.close()


def release_body(request: Request) -> None:
    """Release the memory of the request's body, if it was large."""
    keep_body(request)()


def keep_body(request: Request) -> Callable[[], None]:
    """Keep the memory reserved when the request ends; returns the function that releases it."""
    release: Callable[[], None] | None = request.scope["state"].pop("release_body", None)
    return release or (lambda: None)


def _release_with_body(request: Request, release: Callable[[], None]) -> None:
    both = ExitStack()
    both.callback(keep_body(request))
    both.callback(release)
    request.scope["state"]["release_body"] = both.close


async def read(request: Request, max_bytes: int) -> bytes:
    """The whole body, decompressed.

    Raises BodyTooLarge once it is over `max_bytes`, UnsupportedEncoding, BadRequest for what cannot
    be decompressed, RequestTimeout if it comes too slowly, InvalidJson if the client disconnects.
    """
    return await BodyReader(request, max_bytes).whole()


class BodyReader:
    """A body while it is read; decompressed it has at most `max_size` bytes."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        # The HTTP server has refused what is not a number.  Beside chunks a length has no meaning
        # (RFC 9112, section 6.3), and the server lets it pass.
        chunked = "transfer-encoding" in request.headers
        length = "0" if chunked else request.headers.get("content-length", "0")
        self._announced = number(length) or 0
        self._max_bytes = max_bytes
        coding = coding_of(request.headers.getlist("content-encoding"))
        self._stream: AsyncIterator[bytes] = request.stream()
        if coding:
            self._stream = decoded(self._bounded(self._stream), coding)
        self.max_size = max_bytes if coding else self._announced or max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._deadline = asyncio.get_running_loop().time() + _BODY_SECONDS
        self._check(self._announced)

    async def up_to(self, size: int) -> bytes | None:
        """The body if it is no longer than `size`; else None, and the rest is still to be read."""
        if self._announced > size:
            return None
        while not self._ended and self._size <= size:
            await self._next()
        return b"".join(self._parts) if self._ended and self._size <= size else None

    async def whole(self) -> bytes:
        while not self._ended:
            await self._next()
        return b"".join(self._parts)

    async def _bounded(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Limits the compressed size too: any number of bytes can decompress to none."""
        size = 0
        async for part in stream:
            size += len(part)
            self._check(size)
            yield part

    async def _next(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(now + _SILENCE_SECONDS, self._deadline)):
                part = await anext(self._stream, b"")
        except TimeoutError:
            raise RequestTimeout(
                f"The rest of the body did not arrive within {_SILENCE_SECONDS:g} seconds, or the "
                f"whole body within {_BODY_SECONDS:g}: send it again."
            ) from None
        except ClientDisconnect:
            raise InvalidJson("The connection closed before the whole body arrived.") from None
        self._ended = not part
        self._size += len(part)
        self._check(self._size)
        self._parts.append(part)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(
                f"The body is larger than the {self._max_bytes} bytes that this box accepts."
            )


class BodyMemory:
    """Bounds the memory of large bodies.  A body that does not fit waits, in the order of arrival,
    without delaying other accounts."""

    def __init__(self) -> None:
        self._reserved: Counter[str] = Counter()
        # What wakes those who wait, in their order; only the first of an account is woken.
        self._waiting: defaultdict[str, deque[asyncio.Event]] = defaultdict(deque)

    async def reserve(self, account: str, size: int, max_bytes: int) -> Callable[[], None]:
        """Reserve `size` bytes for a body that may have `max_bytes`.

        Returns the function that releases them, which may be called more than once.  Raises
        RateLimited, NoNodesAvailable.
        """
        turns, turn = self._waiting[account], asyncio.Event()
        if len(turns) >= _MAX_WAITING_PER_ACCOUNT:
            raise RateLimited(
                f"{_MAX_WAITING_PER_ACCOUNT} large bodies of your account are waiting already: "
                "send fewer at a time."
            )
        turns.append(turn)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while turns[0] is not turn or not self._fits(account, size, max_bytes):
                    turn.clear()
                    await turn.wait()
            self._reserved[account] += size
        except TimeoutError:
            raise NoNodesAvailable(
                "The box is busy with other large bodies: try again later.", retry_after=5
            ) from None
        finally:
            turns.remove(turn)
            if not turns:
                del self._waiting[account]
            self._wake()
        reserved = ExitStack()
        reserved.callback(self._release, account, size)
        return reserved.close

    def _fits(self, account: str, size: int, max_bytes: int) -> bool:
        of_account, in_all = self._reserved[account] + size, self._reserved.total() + size
        fits_account = of_account <= _MAX_BODIES_PER_ACCOUNT * max_bytes
        return fits_account and in_all <= _MAX_BODIES * max_bytes

    def _release(self, account: str, size: int) -> None:
        self._reserved[account] -= size
        if not self._reserved[account]:
            del self._reserved[account]
        self._wake()

    def _wake(self) -> None:
        for turns in self._waiting.values():
            turns[0].set()
