"""Bodies on their way in: how much memory they take, and where they are decoded."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
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
from pinaivu_box.openai import large_bodies
from pinaivu_box.openai.request import SMALL, decode
from pinaivu_box.sandbox import SandboxLimit, SandboxLimits, SandboxPool
from pinaivu_box.server.codings import coding_of, decoded
from pinaivu_box.text import number

_SILENT_SECONDS = 30.0  # in the middle of a body
_BODY_SECONDS = 600.0  # for the whole of it
# Large bodies that may be here at a time, of one account and of all, each as large as is allowed.
_OF_ONE, _OF_ALL = 4, 16
_MOST_WAITING = 64  # of one account, for room
_WAIT_SECONDS = 60.0
# What decoding one may take.  The worst of 10 MB takes 2 s and 300 MB on a usual machine.
_LIMITS = SandboxLimits(cpu_seconds=20.0, memory_bytes=1024 * 1024 * 1024, wall_seconds=120.0)

Body = TypeVar("Body", bound=msgspec.Struct)


class Bodies:
    """Small bodies are decoded at once.  Larger ones need room, which is bounded, and are decoded
    by a child process, one at a time of each account."""

    def __init__(self) -> None:
        self._pool = SandboxPool(large_bodies.ENTRY, limits=_LIMITS, size=2)
        self._room = Room()
        self._histories = Room()  # another one, for who waits for it has a body already

    @property
    def pids(self) -> list[int]:
        """Of the processes that decode."""
        return self._pool.pids

    async def receive(
        self, request: Request, account: str, kind: type[Body], most: int, *, strict: bool
    ) -> tuple[Body, list[str]]:
        """As `decode`, of a body of at most so many bytes, decompressed.  The room that a large one
        takes is `scope["state"]["room"]` until somebody leaves it (see `leave`).  Raises what
        `read` and `decode` do, and RateLimited, NoNodesAvailable if there is no room for it."""
        reading = Reading(request, most)
        data = await reading.up_to(SMALL)
        if data is not None:
            return decode(data, kind, strict=strict)
        room = await self._room.take(account, reading.bound, most)
        request.scope["state"]["room"] = room
        data = await reading.whole()
        if len(data) <= SMALL:
            return decode(data, kind, strict=strict)
        payload = large_bodies.job(data, kind, strict=strict)
        del data
        return large_bodies.result(await self._run(payload, account), kind)

    async def make_room(self, request: Request, account: str, size: int, most: int) -> None:
        """For so many bytes of stored responses; what is SMALL needs none.  It is left with that of
        the body.  Raises RateLimited, NoNodesAvailable."""
        if size <= SMALL:
            return
        leave_history = await self._histories.take(account, min(size, most), most)
        state = request.scope["state"]
        leave_body = state.get("room")

        def leave_both() -> None:
            leave_history()
            if leave_body:
                leave_body()

        state["room"] = leave_both

    async def history(self, account: str, rows: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
        """See `large_bodies.history`."""
        if sum(len(given) + len(body) for given, body in rows) <= SMALL:
            return large_bodies.history(rows)
        answer = await self._run(large_bodies.history_job(rows), account)
        return large_bodies.history_result(answer)

    async def _run(self, payload: bytes, account: str) -> bytes:
        try:
            return await self._pool.run_async(payload, tenant=account)
        except SandboxLimit as error:
            raise BodyTooLarge(
                "The body takes too much time or memory to be read: make it simpler, or send "
                "several."
            ) from error

    def close(self) -> None:
        self._pool.close()


def leave(request: Request) -> None:
    """Give back the room of its body, if it has any: what is left of it takes none."""
    take_room(request)()


def take_room(request: Request) -> Callable[[], None]:
    """Keep the room of its body when the request has ended; call what is returned, once."""
    room: Callable[[], None] | None = request.scope["state"].pop("room", None)
    return room or (lambda: None)


async def read(request: Request, most: int) -> bytes:
    """The whole body, decompressed.  Raises BodyTooLarge once it is over `most` bytes,
    UnsupportedEncoding, BadRequest for what cannot be decompressed, RequestTimeout if it comes too
    slowly, InvalidJson if the client hangs up."""
    return await Reading(request, most).whole()


class Reading:
    """A body while it is read.  So many bytes are `announced`, 0 if that is not known; decompressed
    they are `bound` at most."""

    def __init__(self, request: Request, most: int) -> None:
        # What is no number was refused by the HTTP server.  Beside chunks a length says nothing
        # (RFC 9112, section 6.3), and the server lets it pass.
        chunked = "transfer-encoding" in request.headers
        length = "0" if chunked else request.headers.get("content-length", "0")
        self.announced = number(length) or 0
        self._most = most
        coding = coding_of(request.headers.getlist("content-encoding"))
        self._stream: AsyncIterator[bytes] = request.stream()
        if coding:
            self._stream = decoded(self._bounded(self._stream), coding)
        self.bound = most if coding else self.announced or most
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._deadline = asyncio.get_running_loop().time() + _BODY_SECONDS

    async def up_to(self, few: int) -> bytes | None:
        """The body if it is no longer than that; else None, and the rest is yet to be read."""
        self._check(self.announced)
        if self.announced > few:
            return None
        while not self._ended and self._size <= few:
            await self._next()
        return b"".join(self._parts) if self._ended and self._size <= few else None

    async def whole(self) -> bytes:
        self._check(self.announced)
        while not self._ended:
            await self._next()
        return b"".join(self._parts)

    async def _bounded(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What is compressed can be of any length and come to nothing."""
        came = 0
        async for part in stream:
            came += len(part)
            self._check(came)
            yield part

    async def _next(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(now + _SILENT_SECONDS, self._deadline)):
                part = await anext(self._stream, b"")
        except TimeoutError:
            raise RequestTimeout(
                f"The rest of the body did not come within {_SILENT_SECONDS:g} seconds, or the "
                f"whole within {_BODY_SECONDS:g}: send it again."
            ) from None
        except ClientDisconnect:
            raise InvalidJson("The connection closed before the whole body had come.") from None
        self._ended = not part
        self._size += len(part)
        self._check(self._size)
        self._parts.append(part)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise BodyTooLarge(
                f"The body is larger than the {self._most} bytes that this box accepts."
            )


class Room:
    """Bounds the memory of large bodies.  Who finds no room waits, in the order of arrival, without
    standing in the way of other accounts."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._waiting: deque[tuple[str, int, int, asyncio.Future[None]]] = deque()

    async def take(self, account: str, size: int, most: int) -> Callable[[], None]:
        """Room for `size` bytes of a body that may have `most`; what it returns gives it back, if
        it is called, once or more often."""
        waits = sum(name == account for name, _, _, _ in self._waiting)
        if waits >= _MOST_WAITING:
            raise RateLimited(
                f"{_MOST_WAITING} large bodies of your account wait already: send fewer at a time."
            )
        if waits or not self._fits(account, size, most):
            await self._wait(account, size, most)
        else:
            self._taken[account] += size
        held = [size]

        def leave() -> None:
            if held:
                self._give_back(account, held.pop())

        return leave

    def _give_back(self, account: str, size: int) -> None:
        self._taken[account] -= size
        if not self._taken[account]:
            del self._taken[account]
        self._let_in()

    def _fits(self, account: str, size: int, most: int) -> bool:
        ours, all_of_them = self._taken[account] + size, self._taken.total() + size
        return ours <= _OF_ONE * most and all_of_them <= _OF_ALL * most

    async def _wait(self, account: str, size: int, most: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (account, size, most, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await turn
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not turn.cancelled():  # it came at the same moment
                self._give_back(account, size)
            if isinstance(error, TimeoutError):
                raise NoNodesAvailable(
                    "The box is busy with other large bodies: try again later.", retry_after=5
                ) from None
            raise

    def _let_in(self) -> None:
        passed: set[str] = set()
        for entry in list(self._waiting):
            account, size, most, turn = entry
            if account in passed or not self._fits(account, size, most):
                passed.add(account)
                continue
            self._waiting.remove(entry)
            if not turn.done():
                self._taken[account] += size
                turn.set_result(None)
