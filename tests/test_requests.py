"""The life of a request, between a backend that is made up and whoever listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from pinaivu_box.amount import Prices
from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.errors import NoNodesAvailable, Unauthorized
from pinaivu_box.gateway.admission import AdmittedRequest
from pinaivu_box.gateway.backend import Event, Job, Output, Prompt, Started
from pinaivu_box.gateway.quota import Grant, Spending
from pinaivu_box.gateway.request import ChoiceOutput, Failed, Request, RequestEvent
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import EngineInfo

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Talker:
    """Says a word, and another one when it is cancelled, as an engine in the middle of a step."""

    def __init__(self) -> None:
        self._cancelled = asyncio.Event()

    async def serve(self, job: Job, made: list[int]) -> AsyncIterator[Event]:
        sampling = cast("Any", None)
        yield Started("node", "digest", EngineInfo("fake", "none"), sampling, "none", False)
        yield Prompt([1])
        yield Output("one", [], None, 0.0)
        await self._cancelled.wait()
        yield Output("two", [], None, None)
        raise NoNodesAvailable("It was cancelled.")

    def cancel(self, job: Job) -> None:
        self._cancelled.set()


def request_of(backend: Talker) -> Request:
    nothing = cast("Any", None)
    model = Model("fake:1", Path("fake:0"), 0, 0, 0, "", nothing, 0, SamplingConfig())
    job = Job("req_1", model, [], SamplingParams(), None, [], "key_1")
    grant = Grant(0, Spending(), 0, [0.0, 0.0])
    grant.turn.set()
    key = cast("Any", type("Key", (), {"id": "key_1"}))
    admitted = AdmittedRequest([job], key, Prices("0", "0"), grant, lambda tokens, cost: None)
    return Request(admitted, backend, nothing)


async def test_nothing_comes_after_a_refusal() -> None:
    """A listener that is told more after the end of it would wait for another end for ever."""
    request = request_of(Talker())
    running = asyncio.create_task(request.run())
    heard: list[RequestEvent] = []
    while not any(isinstance(event, ChoiceOutput) for event in heard):
        heard += await request.events.take()
    error = Unauthorized("The key has been revoked.")
    request.refuse(error)
    last = await running
    # All that was said until the request was over comes at once, to a slow listener.
    assert await request.events.take() == [Failed(error)]
    assert last == Failed(error) and request.status == 401
