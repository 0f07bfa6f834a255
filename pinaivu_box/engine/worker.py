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
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from typing import BinaryIO

from pinaivu_box.engine import sandboxes
from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.engine import Engine
from pinaivu_box.engine.fake_runner import SCHEME, FakeRunner
from pinaivu_box.engine.messages import (
    Cancel,
    FromEngine,
    LoadFailed,
    LoadModel,
    Ready,
    Refused,
    Tokenized,
    decode_to_engine,
    encode,
    read_body,
)
from pinaivu_box.engine.output import OutputBuffer, StepOutput
from pinaivu_box.engine.preparation_queue import PreparationQueue
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.runner import ModelFacts, Runner
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.engine.scripted_runner import ScriptedRunner
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import BoxError


@dataclass(frozen=True)
class _StopStringFound:
    """A stop string has ended the sequence of that id."""

    id: str


Inbox = queue.SimpleQueue[Sequence | EmbeddingJob | Cancel | _StopStringFound]
OutputEvent = PreparedRequest | Refused | StepOutput
Outbox = queue.SimpleQueue[OutputEvent | Tokenized | Ready | LoadFailed | None]


def main() -> None:
    # Ctrl-C and systemd's SIGTERM reach the whole group; the parent decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.excepthook = _die
    # C libraries print; what they print must not land among the frames.
    frames_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    frames_in = sys.stdin.buffer
    body = read_body(frames_in)
    if body is None:
        return
    load = decode_to_engine(body)
    if not isinstance(load, LoadModel):
        raise BoxError("The first frame of an engine must be LoadModel.")
    outbox: Outbox = queue.SimpleQueue()
    inbox: Inbox = queue.SimpleQueue()
    writer = threading.Thread(target=_write_frames, args=(frames_out, outbox, inbox), daemon=True)
    writer.start()
    preparation: Future[PreparationQueue] = Future()
    # From the beginning: the end of stdin must end us in the middle of loading as well.
    threading.Thread(target=_read_frames, args=(frames_in, preparation), daemon=True).start()
    children = sandboxes.start()  # while the model loads
    try:
        runner = _make_runner(load)
        preparer = RequestPreparer(runner, children, load)
        preparation.set_result(PreparationQueue(preparer, outbox.put, inbox.put))
        engine = Engine(runner, token_budget=load.token_budget)
    except BoxError as error:
        outbox.put(LoadFailed(error.message))
        outbox.put(None)
        writer.join()
        # At a usual exit Python would wait for the thread that reads stdin.
        os._exit(0)
    outbox.put(_ready(runner.facts, preparer.template))
    run(engine, inbox, outbox)


def run(engine: Engine, inbox: Inbox, outbox: Outbox) -> None:
    """The loop: sleep when idle, else take what has arrived and compute one step.

    Reading, tokenizing, text and frames are other threads' work, done while C computes.
    """
    while True:
        if not engine.busy:
            engine.check_integrity()
            _receive(engine, inbox.get())
        while not inbox.empty():
            _receive(engine, inbox.get())
        outbox.put(engine.step())


def _receive(engine: Engine, item: Sequence | EmbeddingJob | Cancel | _StopStringFound) -> None:
    if isinstance(item, Sequence | EmbeddingJob):
        engine.add(item)
    else:
        engine.end(item.id, "cancelled" if isinstance(item, Cancel) else "stop")


def _die(failure: threading.ExceptHookArgs) -> None:
    # An engine that has lost a thread would hang: end it, and the box starts a new one.
    traceback.print_exception(failure.exc_value)
    sys.stderr.flush()
    os._exit(1)


def _ready(facts: ModelFacts, template: SandboxedTemplate) -> Ready:
    return Ready(
        build=facts.build,
        device=facts.device,
        context=facts.context,
        kv_tokens=facts.kv_tokens,
        max_sequences=facts.max_sequences,
        defaults=facts.defaults,
        tool_style=template.style.name,
        thinks=template.thinks,
    )


def _make_runner(load: LoadModel) -> Runner:
    if load.path.startswith(SCHEME):
        return ScriptedRunner(load) if load.path.endswith(".json") else FakeRunner(load)
    from pinaivu_box.engine.llama_runner import LlamaRunner

    return LlamaRunner(load)


def _read_frames(stream: BinaryIO, preparation: Future[PreparationQueue]) -> None:
    while (body := read_body(stream)) is not None:
        message = decode_to_engine(body)
        if not isinstance(message, LoadModel):
            preparation.result().take(message)
    os._exit(0)


def _write_frames(stream: BinaryIO, outbox: Outbox, inbox: Inbox) -> None:
    # A full pipe (a busy parent) blocks this thread, not the steps: what they give meanwhile goes
    # into one frame.
    output, taken = OutputBuffer(), False
    try:
        while (event := outbox.get()) is not None:
            if isinstance(event, OutputEvent):
                taken = True
                for request_id in output.take(event):
                    inbox.put(_StopStringFound(request_id))
            else:
                _write(stream, event)
            if taken and (output.large or outbox.empty()):
                _write(stream, output.frame())
                taken = False
    except BrokenPipeError:
        os._exit(0)


def _write(stream: BinaryIO, frame: FromEngine) -> None:
    data = memoryview(encode(frame))
    while data:
        data = data[stream.write(data) :]
