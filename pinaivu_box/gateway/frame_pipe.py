"""The pipe on which an engine's frames come: read as soon as the event loop hears of data, with no
task that would have to be woken for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from pinaivu_box.engine.messages import (
    LENGTH_BYTES,
    FromEngine,
    Output,
    StepFrame,
    body_length,
    decode_from_engine,
)

_READ_BYTES = 1 << 16  # what a pipe holds


class FramePipe:
    """`take` gets the frames of each read, in order; those that are not whole yet wait.

    `writer` is the file descriptor for the child, which the parent closes once the child has it.
    `ended` is done when the child has closed its end, or when it has the exception of a frame that
    cannot be read, or of `take`.
    """

    def __init__(self, take: Callable[[Sequence[FromEngine]], None]) -> None:
        self._take = take
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._unread = bytearray()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._reader, self._read)

    def close(self) -> None:
        """Read no more; it may have ended before."""
        if not self.ended.done():
            self._end(None)

    def _read(self) -> None:
        try:
            data = os.read(self._reader, _READ_BYTES)
        except BlockingIOError:
            return
        try:
            length = int.from_bytes(data[:LENGTH_BYTES], "little")
            # The usual case, once a step.
            if length and length == len(data) - LENGTH_BYTES and not self._unread:
                self._take([decode_from_engine(data[LENGTH_BYTES:])])
                return
            self._unread += data
            if frames := self._whole_frames():
                self._take(frames)
        except Exception as error:
            self._end(error)
            return
        if not data:
            self._end(None)

    def _whole_frames(self) -> list[FromEngine]:
        unread, position, frames = self._unread, 0, []
        size = len(unread)
        while size - position >= LENGTH_BYTES:
            begin = position + LENGTH_BYTES
            end = begin + body_length(unread[position:begin])
            if end > size:
                break
            frames.append(decode_from_engine(bytes(unread[begin:end])))
            position = end
        del unread[:position]
        return frames

    def _end(self, error: Exception | None) -> None:
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def joined(frames: Sequence[FromEngine]) -> Sequence[FromEngine]:
    """With each run of step frames as a single one: who is late has as much to do as who is not."""
    if len(frames) == 1:
        return frames
    result: list[FromEngine] = []
    for frame in frames:
        last = result[-1] if result else None
        if isinstance(frame, StepFrame) and isinstance(last, StepFrame):
            result[-1] = _joined_steps(last, frame)
        else:
            result.append(frame)
    return result


def _joined_steps(first: StepFrame, second: StepFrame) -> StepFrame:
    outputs = first.outputs
    for request_id, output in second.outputs.items():
        before = outputs.get(request_id)
        outputs[request_id] = output if before is None else _joined_output(before, output)
    prompts = {**first.prompts, **second.prompts}
    refused, numbers = [*first.refused, *second.refused], {**first.numbers, **second.numbers}
    replayed = first.replayed
    for request_id, tokens in second.replayed.items():
        replayed[request_id] = replayed.get(request_id, []) + tokens
    return StepFrame(prompts, refused, outputs, second.load, numbers, replayed)


def _joined_output(first: Output, second: Output) -> Output:
    return Output(
        first.text + second.text,
        first.tokens + second.tokens,
        second.finish_reason,
        second.queue_ms if first.queue_ms is None else first.queue_ms,
        second.cached_tokens if first.cached_tokens is None else first.cached_tokens,
        second.shifted_tokens,
        first.logprobs + second.logprobs,
        second.stop_string,
        first.vectors + second.vectors,
    )
