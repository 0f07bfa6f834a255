"""Answers that are being made, and the streams of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pinaivu_box.server.running_answers import RunningAnswer
from tests.support.waiting import soon

pytestmark = pytest.mark.anyio


async def test_the_stream_of_a_silent_answer_ends_when_its_browser_leaves() -> None:
    unused: Any = None
    call: Any = SimpleNamespace(key=SimpleNamespace(account_id="acct_a"))
    answer = RunningAnswer(call, unused, unused, unused, unused, unused)
    left = asyncio.Event()

    async def disconnected() -> None:
        await left.wait()

    async def stream() -> list[object]:
        watcher = asyncio.create_task(disconnected())
        with answer.followed(watcher):
            return [delta async for delta in answer.deltas(watcher)]

    streams = [asyncio.create_task(stream()) for _ in range(16)]
    await asyncio.sleep(0)
    left.set()
    assert await soon(asyncio.gather(*streams)) == [[]] * 16
    answer.check_followers()
