"""Delays before another attempt, and dictionaries that forget."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from pinaivu_box import backoff
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.tasks import TaskSet


def test_a_delay_doubles_up_to_the_longest() -> None:
    delays = [backoff.delay(failures, 1.0, 60.0) for failures in range(1, 9)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.delay(10_000, 1.0, 60.0) == 60


def test_delays_of_those_that_failed_together_differ() -> None:
    random = Random(1)
    delays = {backoff.delay(3, 1.0, 60.0, random) for _ in range(100)}
    assert len(delays) == 100 and all(2.0 <= delay <= 6.0 for delay in delays)


def test_a_bounded_dictionary_keeps_what_was_set_last() -> None:
    kept: BoundedDict[str, int] = BoundedDict(2)
    for number, key in enumerate("abac"):
        kept[key] = number
    assert dict(kept) == {"a": 2, "c": 3}


@pytest.mark.anyio
async def test_background_tasks_are_forgotten_when_they_end_and_end_when_cancelled() -> None:
    tasks, ended = TaskSet(), []

    async def work(seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)

    await tasks.spawn(work(0))
    await asyncio.sleep(0)
    assert len(tasks) == 0
    running = tasks.spawn(work(1000))
    await asyncio.sleep(0)
    await tasks.cancel()
    assert ended == [0, 1000] and running.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await running
