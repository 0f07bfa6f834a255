"""The engine child's main: frames in on stdin, frames out on the old stdout, one loop between.

End of file on stdin means that the parent is gone (or wants us gone): exit at once, whatever C
code is doing.  So no engine outlives its box, not even after kill -9.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from typing import BinaryIO

from pinaivu_box.engine.engine import Engine
from pinaivu_box.engine.fake_runner import SCHEME, FakeRunner
from pinaivu_box.engine.messages import (
    Add,
    Cancel,
    FromEngine,
    Load,
    LoadFailed,
    Progress,
    Ready,
    decode_to_engine,
    encode,
    read_body,
)
from pinaivu_box.engine.runner import ProgressCallback, Runner
from pinaivu_box.errors import BoxError


def main() -> None:
    # Ctrl-C reaches the whole process group; the parent decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # C libraries print; what they print must not land among the frames.
    frames_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    frames_in = sys.stdin.buffer
    body = read_body(frames_in)
    if body is None:
        return
    load = decode_to_engine(body)
    if not isinstance(load, Load):
        raise BoxError("The first frame of an engine must be Load.")
    outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
    inbox: queue.SimpleQueue[Add | Cancel] = queue.SimpleQueue()
    threading.Thread(target=_write_frames, args=(frames_out, outbox), daemon=True).start()
    threading.Thread(target=_read_frames, args=(frames_in, inbox), daemon=True).start()
    try:
        runner = _make_runner(load, _report_progress(outbox))
        engine = Engine(runner, token_budget=load.token_budget)
    except BoxError as error:
        frames_out.write(encode(LoadFailed(error.message)))
        return
    facts = runner.facts
    outbox.put(
        Ready(
            build=facts.build,
            device=facts.device,
            context=facts.context,
            kv_tokens=facts.kv_tokens,
            max_sequences=facts.max_sequences,
            defaults=facts.defaults,
        )
    )
    run(engine, inbox, outbox)


def run(
    engine: Engine,
    inbox: queue.SimpleQueue[Add | Cancel],
    outbox: queue.SimpleQueue[FromEngine],
) -> None:
    """The loop: sleep when idle, else take what has arrived and compute one step."""
    while True:
        if not engine.busy:
            engine.receive(inbox.get())
        while not inbox.empty():
            engine.receive(inbox.get())
        outbox.put(engine.step())


def _make_runner(load: Load, progress: ProgressCallback) -> Runner:
    if load.path.startswith(SCHEME):
        return FakeRunner(load)
    from pinaivu_box.engine.llama_runner import LlamaRunner

    return LlamaRunner(load, progress)


def _report_progress(outbox: queue.SimpleQueue[FromEngine]) -> ProgressCallback:
    last = -1.0

    def report(fraction: float) -> None:
        nonlocal last
        if fraction - last >= 0.05:
            last = fraction
            outbox.put(Progress(fraction))

    return report


def _read_frames(stream: BinaryIO, inbox: queue.SimpleQueue[Add | Cancel]) -> None:
    while (body := read_body(stream)) is not None:
        message = decode_to_engine(body)
        if isinstance(message, Add | Cancel):
            inbox.put(message)
    os._exit(0)


def _write_frames(stream: BinaryIO, outbox: queue.SimpleQueue[FromEngine]) -> None:
    # A thread of its own: a full pipe (a busy parent) must not hold up a step.
    try:
        while True:
            data = memoryview(encode(outbox.get()))
            while data:
                data = data[stream.write(data) :]
    except BrokenPipeError:
        os._exit(0)
