"""`POST /v1/chat/completions`: body to job, events to a body or a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

from msgspec import UNSET
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from pinaivu_box.box import Box
from pinaivu_box.config import SamplingConfig
from pinaivu_box.errors import BodyTooLarge, InvalidJson, RequestTimeout
from pinaivu_box.gateway.backend import Job, Output
from pinaivu_box.gateway.requests import Failed, Finished, RequestEvent
from pinaivu_box.gateway.requests import Request as Running
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.chunks import ChunkBuilder
from pinaivu_box.openai.request import decode, normalise
from pinaivu_box.openai.types import (
    AssistantMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ContextShift,
    PromptTokensDetails,
    Usage,
)
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.stream import EventStream

_BODY_SECONDS = 30.0  # of silence in the middle of a body
_SEED_BITS = 53  # a seed that we choose also survives in JSON numbers


async def chat_completions(request: Request) -> Response:
    require_account(request)
    box: Box = request.app.state.box
    state = request.scope["state"]
    body = decode(await read_body(request, box.config.server.max_body_bytes))
    model = box.admission.check(body.model, box.requests.in_flight)
    job = make_job(body, model, state["request_id"], key_of(request).id)
    running = box.requests.start(job, key_of(request).id)
    state["logged"] = True  # from here on the request logs itself
    watcher = asyncio.create_task(_cancel_on_disconnect(request.receive, running))
    try:
        if body.stream:
            grace = box.config.server.stream_grace_seconds
            return await _stream(body, running, grace, watcher)
        return JSON(await _collect(running))
    finally:
        if not body.stream:
            watcher.cancel()


# -- the body ------------------------------------------------------------------------------------


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; BodyTooLarge once it is over `limit` bytes."""
    announced = request.headers.get("content-length", "0")
    parts: list[bytes] = []
    size = int(announced) if announced.isdigit() else 0
    try:
        if size <= limit:
            size = 0
            stream = request.stream()
            while part := await asyncio.wait_for(anext(stream, b""), _BODY_SECONDS):
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
    except TimeoutError:
        raise RequestTimeout(
            f"The rest of the body did not come within {_BODY_SECONDS:g} seconds: send it again."
        ) from None
    except ClientDisconnect:
        raise InvalidJson("The connection closed before the whole body had come.") from None
    if size > limit:
        raise BodyTooLarge(f"The body is larger than the {limit} bytes that this box accepts.")
    return b"".join(parts)


def make_job(body: ChatRequest, model: Model, request_id: str, tenant: str) -> Job:
    messages, stop = normalise(body)
    seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed
    limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    return Job(
        request_id=request_id,
        model=model,
        messages=messages,
        asked=SamplingConfig(temperature=body.temperature, top_p=body.top_p),
        seed=seed,
        max_tokens=min(limits) if limits else None,
        stop=stop,
        tenant=tenant,
        ignore_eos=bool(body.ignore_eos),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        priority=body.pinaivu.priority if body.pinaivu else 0,
    )


# -- the answer ----------------------------------------------------------------------------------


async def _cancel_on_disconnect(receive: Receive, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.cancel()


async def _collect(running: Running) -> ChatCompletion:
    text: list[str] = []
    while True:
        for event in await running.events.take():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return _completion(running, "".join(text), event)
            text.append(event.text)


def _completion(running: Running, text: str, end: Finished) -> ChatCompletion:
    job = running.account.job
    return ChatCompletion(
        id=job.request_id.replace("req_", "chatcmpl-"),
        request_id=job.request_id,
        created=int(running.account.created),
        model=job.model.id,
        choices=[Choice(AssistantMessage(text), end.finish_reason)],
        usage=_usage(end),
        context_shift=ContextShift(end.shifted_tokens) if end.shifted_tokens else UNSET,
    )


def _usage(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(end.cached_tokens),
    )


async def _stream(
    body: ChatRequest, running: Running, grace: float, watcher: asyncio.Task[None]
) -> Response:
    job = running.account.job
    chunks = ChunkBuilder(
        completion_id=job.request_id.replace("req_", "chatcmpl-"),
        request_id=job.request_id,
        created=int(time.time()),
        model=job.model.id,
        with_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
    first = asyncio.create_task(running.events.take())
    # A failure before the first token keeps its own status; a long wait (the engine is loading, or
    # the queue is long) is bridged with comments after the grace.
    await asyncio.wait({first}, timeout=grace)
    if first.done() and isinstance(event := first.result()[0], Failed):
        watcher.cancel()
        raise event.error
    return EventStream(_chunks(running, first, chunks), watcher)


async def _chunks(
    running: Running, first: asyncio.Task[list[RequestEvent]], chunks: ChunkBuilder
) -> AsyncIterator[bytes]:
    yield chunks.role()
    events = await first
    while True:
        parts: list[bytes] = []  # what has piled up meanwhile goes out in one write
        for event in events:
            if isinstance(event, Output):
                parts.append(chunks.text(event.text) if event.text else b"")
            elif isinstance(event, Finished):
                parts.append(chunks.end(event.finish_reason, _usage(event), event.shifted_tokens))
            else:
                parts.append(chunks.error(event.error))
        if data := b"".join(parts):
            yield data
        if not isinstance(event, Output):
            return
        events = await running.events.take()
