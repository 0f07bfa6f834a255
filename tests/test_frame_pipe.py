"""The pipe of an engine's frames, in this process: the test writes what a child would."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pinaivu_box.engine.messages import (
    EngineLoad,
    FromEngine,
    Output,
    Prompt,
    Refused,
    StepFrame,
    Tokenized,
    TokenLogprob,
    encode,
)
from pinaivu_box.gateway.frame_pipe import FramePipe, joined
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Pipe:
    """`heard` is what each read has given."""

    def __init__(self) -> None:
        self.heard: list[Sequence[FromEngine]] = []
        self.pipe = FramePipe(self.heard.append)

    def write(self, *data: bytes) -> None:
        os.write(self.pipe.writer, b"".join(data))

    def close(self) -> None:
        os.close(self.pipe.writer)


def step(load: int = 0, **outputs: Output) -> StepFrame:
    return StepFrame({}, [], outputs, EngineLoad(steps=load))


def tokens(name: str, *numbers: int) -> Tokenized:
    return Tokenized(name, [*numbers])


async def test_frames_come_whole_and_in_order_however_they_were_written() -> None:
    pipe = Pipe()
    frames = [tokens("a", 1), tokens("b", *range(1000)), tokens("c"), tokens("d", 4)]
    data = b"".join(map(encode, frames))
    for at in range(0, len(data), 97):
        pipe.write(data[at : at + 97])
        await asyncio.sleep(0)
    pipe.close()
    await pipe.pipe.ended
    assert [frame for read in pipe.heard for frame in read] == frames
    assert all(pipe.heard)


async def test_the_end_in_the_middle_of_a_frame_is_an_end() -> None:
    pipe = Pipe()
    pipe.write(encode(tokens("a", 1)), encode(tokens("b", 2))[:-1])
    pipe.close()
    await pipe.pipe.ended
    assert [frame for read in pipe.heard for frame in read] == [tokens("a", 1)]
    pipe.pipe.close()  # again, which does no harm


@pytest.mark.parametrize("data", [b"\x01\0\0\0\xc1", b"\xff\xff\xff\xff"])
async def test_what_is_no_frame_ends_the_pipe_with_an_error(data: bytes) -> None:
    pipe = Pipe()
    pipe.write(encode(tokens("a", 1)))
    await wait_until(lambda: pipe.heard)
    pipe.write(data)
    with pytest.raises(ValueError, match=r"frame|invalid|malformed"):
        await pipe.pipe.ended
    assert pipe.heard == [[tokens("a", 1)]]
    pipe.close()


def test_steps_that_come_together_are_one() -> None:
    likely = [TokenLogprob(b"x", -1.0, [])]
    first = StepFrame(
        {"a": Prompt([1, 2])},
        [Refused("r", "code", "why")],
        {"a": Output("He", [5], None, 12.5, 2), "b": Output("x", [7], logprobs=likely)},
        EngineLoad(steps=1),
        {"d": b"1"},
    )
    second = step(2, a=Output("llo", [6, 7], shifted_tokens=3), c=Output("new", [9]))
    third = step(3, a=Output("!", [8], "stop", stop_string="?", shifted_tokens=3))
    third = msgspec.structs.replace(third, numbers={"a": b"2"})
    other = step(4, b=Output("y", [8], "length", logprobs=likely, vectors=[b"v"]))
    made, between, last = joined([first, second, third, tokens("t"), other])
    assert (between, last) == (tokens("t"), other)
    assert made == StepFrame(
        {"a": Prompt([1, 2])},
        [Refused("r", "code", "why")],
        {
            "a": Output("Hello!", [5, 6, 7, 8], "stop", 12.5, 2, 3, stop_string="?"),
            "b": Output("x", [7], logprobs=likely),
            "c": Output("new", [9]),
        },
        EngineLoad(steps=3),
        {"a": b"2", "d": b"1"},
    )


def test_no_field_of_an_output_is_lost_when_two_become_one() -> None:
    """Whoever adds a field has to say here what becomes of it."""
    likely = [TokenLogprob(b"x", -1.0, [])]
    values: dict[str, Any] = {
        "text": "t", "tokens": [1], "finish_reason": "stop", "queue_ms": 1.0, "cached_tokens": 2,
        "shifted_tokens": 3, "logprobs": likely, "stop_string": "s", "vectors": [b"v"],
    }  # fmt: skip
    assert [*values] == [*Output.__struct_fields__]
    (made,) = joined([step(a=Output("", [])), step(a=Output(**values))])
    assert isinstance(made, StepFrame) and made.outputs["a"] == Output(**values)
