"""`GET /v1/admin/events`: what the box does now; with `Accept: text/event-stream` as a stream.

Of its events, `now` has the requests that run or wait; `finished` one that has ended; `sums` says
that the sums over time have changed.  A reader costs at most one look a second, at a bounded number
of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.amount import to_text
from pinaivu_box.box import Box
from pinaivu_box.errors import RateLimited, StoreError
from pinaivu_box.gateway import request as running
from pinaivu_box.gateway.activity import Activity, FinishedRequest, node_of
from pinaivu_box.gateway.admission import draining, refusal
from pinaivu_box.membership import peer_names
from pinaivu_box.server.auth import LOCAL, key_of
from pinaivu_box.server.context import box_of
from pinaivu_box.server.inference import disconnected
from pinaivu_box.server.sessions import address_of, session_of
from pinaivu_box.server.sessions import find as find_session
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.store import keys
from pinaivu_box.store.keys import Key
from pinaivu_box.text import utc_text

MAX_STREAMS = 50
MAX_SHOWN = 50  # requests that run or wait
_LOOK_SECONDS = 1.0
_CHECK_SECONDS = 5.0  # how often it is seen whether the reader may still read
_SUMS_SECONDS = 5.0
_NAMES_SECONDS = 60.0


class RunningView(Struct, frozen=True):
    """A request that runs or waits.  `state`: "waiting" for its turn, "reading" its prompt, or
    "answering".  `node` is "" until a box has begun it; its name is "this box" or a peer's."""

    request_id: str
    model: str
    key: str
    key_name: str
    account_name: str
    node: str
    node_name: str
    state: str
    since: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int


class FinishedView(Struct, frozen=True):
    """A request that has ended with an HTTP `status`; `receipt` says whether it has one."""

    request_id: str
    at: str
    model: str
    key: str
    key_name: str
    account_name: str
    node: str
    node_name: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: str
    currency: str
    ttft_ms: int | None
    total_ms: int
    receipt: bool


class NowView(Struct, frozen=True):
    """`running` has at most 50 of the `count` requests, the oldest first."""

    count: int
    running: list[RunningView]


class ActivityView(NowView, frozen=True):
    """The same, with the last requests that have ended, the latest first."""

    finished: list[FinishedView]
    request_id: str = ""


class NodeNames:
    """The names of boxes, read again after a while: peers are seldom renamed."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._names: dict[str, str] = {}
        self._read_at: float | None = None

    async def read(self) -> dict[str, str]:
        now = time.monotonic()
        if self._read_at is None or now - self._read_at > _NAMES_SECONDS:
            names = await peer_names.names(self._box.database)
            self._names = {**names, self._box.identity.node_id: "this box"}
            self._read_at = now
        return self._names


async def follow(request: Request) -> ActivityView | EventStream:
    """Raises RateLimited, NoNodesAvailable for a stream while the box drains."""
    box = box_of(request)
    activity = box.requests.activity
    if "text/event-stream" not in request.headers.get("accept", ""):
        names = await NodeNames(box).read()
        now = now_view(box, names)
        finished = [finished_view(each, box, names) for each in reversed(activity.finished)]
        return ActivityView(now.count, now.running, finished)
    if box.admission.draining:
        raise draining()
    if activity.followers >= MAX_STREAMS:
        raise RateLimited(
            f"{MAX_STREAMS} streams of events are open, which is the limit: close a page.",
            retry_after=30,
        )
    watcher = asyncio.create_task(disconnected(request.receive))
    return EventStream(_events(request, activity, watcher), watcher)


async def _events(
    request: Request, activity: Activity, watcher: asyncio.Task[None]
) -> AsyncIterator[bytes]:
    if request.method == "HEAD":
        return
    box = box_of(request)
    names = NodeNames(box)
    activity.followers += 1
    try:
        seen, told, summed = -1, _told(activity, request), _sums(box)
        checked = sums_at = time.monotonic()
        yield encode_event(now_view(box, await names.read()), "now")
        while not watcher.done() and not box.admission.draining:
            await _look_later(activity, seen, watcher)
            now = time.monotonic()
            if now - checked > _CHECK_SECONDS:
                if not await _may_read(request):
                    return
                checked = now
            count = activity.changes.count
            known = await names.read()
            if count != seen or box.requests.count:  # what runs makes tokens
                yield encode_event(now_view(box, known), "now")
            for each in [each for each in activity.finished if each.number > told]:
                yield encode_event(finished_view(each, box, known), "finished", each.request_id)
                told = each.number
            seen = count
            if (sums := _sums(box)) != summed and now - sums_at > _SUMS_SECONDS:
                yield encode_event({}, "sums")
                summed, sums_at = sums, now
    finally:
        activity.followers -= 1


async def _look_later(activity: Activity, seen: int, watcher: asyncio.Task[None]) -> None:
    """Not before a second has passed, so that a busy box costs a reader no more."""
    await asyncio.wait({watcher}, timeout=_LOOK_SECONDS)
    if not watcher.done():
        await activity.changes.wait(seen, _LOOK_SECONDS)


def _told(activity: Activity, request: Request) -> int:
    """The number of the last request that the reader knows: the one of its `Last-Event-ID`.  If
    that is none of the latest, it knows none of them: all came since, or the box was restarted."""
    last = request.headers.get("last-event-id")
    if last is None:
        return activity.ended_count
    return next((each.number for each in activity.finished if each.request_id == last), 0)


def _sums(box: Box) -> tuple[int, int]:
    """Changes when the sums over time do: requests end, and refusals are written later."""
    return box.requests.activity.ended_count, box.refusals.flushed


async def _may_read(request: Request) -> bool:
    """Whether the session has not ended, and its pages key or the key that asks is still valid, an
    admin's, and good for where the request comes from."""
    box, key = box_of(request), key_of(request)
    if key is LOCAL:
        return True
    if session_of(request) is not None:
        session = await find_session(box, request.headers)
        if session is None:
            return False
        present = session.key
    else:
        try:
            present = await keys.get(box.database, key.id)
        except StoreError:
            return False
    admits = present.policy.admits(address_of(request))
    return refusal(present) is None and present.admin and admits


def now_view(box: Box, names: dict[str, str]) -> NowView:
    requests = box.requests.oldest(MAX_SHOWN)
    return NowView(box.requests.count, [_running_view(each, names) for each in requests])


def _running_view(request: running.Request, names: dict[str, str]) -> RunningView:
    record, node = request.record, node_of(request.record)
    answering = record.ttft_ms is not None
    return RunningView(
        request_id=record.job.request_id,
        model=record.job.model.id,
        key=request.key.id,
        key_name=name_of(request.key),
        account_name=request.key.account,
        node=node,
        node_name=names.get(node, ""),
        state="answering" if answering else "reading" if node else "waiting",
        since=utc_text(record.created),
        seconds=record.elapsed_ms() / 1000,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
    )


def finished_view(each: FinishedRequest, box: Box, names: dict[str, str]) -> FinishedView:
    return FinishedView(
        request_id=each.request_id,
        at=utc_text(each.at / 1000),
        model=each.model,
        key=each.key.id,
        key_name=name_of(each.key),
        account_name=each.key.account,
        node=each.node_id,
        node_name=names.get(each.node_id, ""),
        status=each.status,
        prompt_tokens=each.prompt_tokens,
        cached_tokens=each.cached_tokens,
        completion_tokens=each.completion_tokens,
        cost=to_text(each.amount),
        currency=box.config.pricing.currency,
        ttft_ms=each.ttft_ms,
        total_ms=each.total_ms,
        receipt=each.receipt,
    )


def name_of(key: Key) -> str:
    """As `store.usage.names_of` has it."""
    return key.name or f"{key.prefix}...{key.last_four}"
