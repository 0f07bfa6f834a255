"""One question to an engine child of its own, which ends after the answer.

What it does (loading the libraries of GPUs, reading a model's header) can crash or hang; then it is
the child that does.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TypeVar

import msgspec

from pinaivu_box import child
from pinaivu_box.engine.messages import (
    LENGTH_BYTES,
    Devices,
    ListDevices,
    LoadFailed,
    OutOfMemory,
    Probe,
    Probed,
    body_length,
    decode_from_engine,
    encode,
)
from pinaivu_box.errors import BoxError, quoted

_END_SECONDS = 10.0
_MAX_LINE = 300  # characters of what the child has printed last
_Answer = TypeVar("_Answer", Devices, Probed)


class QueryFailed(BoxError):
    """There is no answer; the message says why, as the end of a sentence.  `memory` is set if a
    device had too little."""

    def __init__(self, message: str, memory: OutOfMemory | None = None) -> None:
        super().__init__(message)
        self.memory = memory


async def ask(question: ListDevices | Probe, answer: type[_Answer], seconds: float) -> _Answer:
    """The answer of that type, within so many seconds.  Raises QueryFailed."""
    if child.executable_replaced():
        raise QueryFailed("the executable was replaced since the box started; start it anew")
    process = await asyncio.create_subprocess_exec(
        *child.command("engine"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    printing = asyncio.create_task(_last_line(process.stderr))
    try:
        reply = await asyncio.wait_for(_exchange(process, encode(question)), seconds)
    except TimeoutError:
        raise QueryFailed(f"it did not answer within {seconds:g} seconds") from None
    finally:
        await _end(process, printing)
    if isinstance(reply, answer):
        return reply
    if isinstance(reply, LoadFailed):
        raise QueryFailed(reply.message, reply.memory)
    printed = printing.result() if printing.done() and not printing.cancelled() else ""
    raise QueryFailed(_how_it_ended(process.returncode or 0, printed))


async def _exchange(process: asyncio.subprocess.Process, question: bytes) -> Any:
    """What it answers, None if it ends before."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question)  # it stays open: the end of that would end the child
        header = await process.stdout.readexactly(LENGTH_BYTES)
        return decode_from_engine(await process.stdout.readexactly(body_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except (ValueError, msgspec.MsgspecError) as error:
        raise QueryFailed(f"what the engine answered is no frame: {error}") from error


async def _end(process: asyncio.subprocess.Process, printing: asyncio.Task[str]) -> None:
    """Kill it unless it has ended.  What it has written is read to the end, or waiting for it could
    last for ever; and one that a driver does not let go is left behind."""
    assert process.stdout is not None
    if not process.stdout.at_eof():  # else it has ended by itself, and its status says how
        _kill(process)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_SECONDS):
            while await process.stdout.read(65536):
                pass
            await asyncio.wait({printing})
            await process.wait()
    _kill(process)
    printing.cancel()


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _last_line(stream: asyncio.StreamReader) -> str:
    last = b""
    while piece := await stream.read(65536):  # whatever its lines are like
        last = (last + piece)[-65536:]
    lines = last.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _how_it_ended(code: int, printed: str) -> str:
    how = f"crashed with signal {-code}" if code < 0 else f"ended with status {code}"
    return f"the engine {how}: {quoted(printed, _MAX_LINE) or 'it printed nothing'}"
