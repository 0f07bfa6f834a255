"""Who writes an engine's frames, and in which order: the test reads the pipe."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pytest

from pinaivu_box.engine.frame_writer import FrameWriter
from pinaivu_box.engine.messages import (
    EngineLoad,
    FromEngine,
    StepFrame,
    Tokenized,
    decode_from_engine,
    read_body,
)
from pinaivu_box.engine.output import StepOutput


class Pipe:
    def __init__(self) -> None:
        reader, self._end = os.pipe()
        self.stream: BinaryIO = os.fdopen(reader, "rb")
        self.stopped: list[str] = []
        self.writer = FrameWriter(self._end, self.stopped.append)

    @property
    def has_data(self) -> bool:
        """At once."""
        return bool(select.select([self.stream], [], [], 0)[0])

    def read(self) -> FromEngine:
        body = read_body(self.stream)
        assert body is not None
        return decode_from_engine(body)

    def close(self) -> None:
        self.writer.close()
        os.close(self._end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()
    made.stream.close()


def step(number: int) -> StepOutput:
    return StepOutput([], EngineLoad(steps=number))


def number_of(frame: FromEngine) -> int:
    assert isinstance(frame, StepFrame)
    return frame.load.steps


def test_a_small_step_is_written_before_the_next_is_computed(pipe: Pipe) -> None:
    for number in range(100):
        pipe.writer.put_step(step(number))
        assert pipe.has_data
        assert number_of(pipe.read()) == number


def test_a_large_step_is_written_by_the_thread(pipe: Pipe) -> None:
    ids = [f"r{number}" for number in range(64)]
    tokens, logits = [1] * len(ids), np.zeros(len(ids), np.float32)
    pipe.writer.put_step(StepOutput([], EngineLoad(steps=7), (ids, tokens, logits)))
    assert number_of(pipe.read()) == 7


def test_a_full_pipe_holds_up_no_step_and_loses_nothing(pipe: Pipe) -> None:
    large = Tokenized("large", [], "x" * 300_000)  # several times what a pipe holds
    pipe.writer.put(large)
    select.select([pipe.stream], [], [])  # the thread has begun to write it
    for number in range(1, 51):
        pipe.writer.put_step(step(number))  # returns, though nobody reads
    assert pipe.read() == large
    numbers = [0]
    while numbers[-1] < 50:  # what came meanwhile may be in one frame
        numbers.append(number_of(pipe.read()))
    assert numbers == sorted(numbers)
    pipe.writer.put_step(step(51))
    assert number_of(pipe.read()) == 51


def test_a_pipe_that_fills_in_a_small_step_gets_the_rest_later(pipe: Pipe) -> None:
    count = 5000  # more frames than a pipe holds
    for number in range(1, count + 1):
        pipe.writer.put_step(step(number))
    seen = 0
    while seen < count:
        number = number_of(pipe.read())
        assert number > seen
        seen = number


def test_a_step_never_overtakes_what_was_put_before_it(pipe: Pipe) -> None:
    for number in range(300):
        pipe.writer.put(Tokenized(str(number), []))
        pipe.writer.put_step(step(number))
    kinds: list[int] = []
    last = -1
    while last < 299:
        frame = pipe.read()
        if isinstance(frame, Tokenized):
            kinds.append(int(frame.id))
        else:
            last = number_of(frame)
            assert kinds == [*range(len(kinds))]
            assert len(kinds) > last  # all that was put before that step
