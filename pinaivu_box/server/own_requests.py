"""Requests that the box makes for an account without being asked: they are metered, limited and
receipted as any of the key's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pinaivu_box.box import Box
from pinaivu_box.engine.messages import Output, SamplingParams
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.reader import Reader, Text
from pinaivu_box.server.access_log import new_request_id
from pinaivu_box.server.inference import reader_of
from pinaivu_box.store.keys import Key

_LOWEST_PRIORITY = -100  # among the key's own


async def vectors(box: Box, key: Key, model: Model, texts: list[str]) -> list[bytes]:
    """The vectors of the texts (little-endian floats of 32 bits).  Raises ApiError."""
    found: list[bytes] = []
    async for event in _events(box, key, _job(model, key, inputs=list(texts))):
        if isinstance(event, Output):
            found += event.vectors
    return found


async def text(box: Box, key: Key, model: Model, **fields: Any) -> str:
    """The answer to a chat, without thoughts; `fields` are those of a Job.  Raises ApiError.

    It comes after all other requests of the key; if the caller is cancelled it is stopped.
    """
    job = _job(model, key, priority=_LOWEST_PRIORITY, **fields)
    reader, parts = Reader(None), []  # until it is started
    async for event in _events(box, key, job.with_usual_stop()):
        match event:
            case ChoiceStarted():
                reader = reader_of(job, event)
            case Output():
                pieces = reader.read(event)
                parts += [piece.text for piece in pieces if isinstance(piece, Text)]
    return "".join(parts)


async def _events(box: Box, key: Key, job: Job) -> AsyncIterator[RequestEvent]:
    """The events of a request with that one job, up to its end.  Raises ApiError."""
    running = box.requests.start(await box.admission.admit(key, [job]))
    try:
        while True:
            for event in await running.events.take():
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
    except BaseException:
        running.cancel()
        raise


def _job(model: Model, key: Key, **fields: Any) -> Job:
    defaults: dict[str, Any] = {"messages": [], "max_tokens": None, "stop": []}
    return Job(
        request_id=new_request_id(),
        model=model,
        sampling=SamplingParams(seed=0, temperature=0.0),
        tenant=key.id,
        **{**defaults, **fields},
    )
