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
from typing import TYPE_CHECKING, BinaryIO

from pinaivu_box import startup
from pinaivu_box.engine import sandboxes
from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.engine import Engine
from pinaivu_box.engine.frame_writer import FrameWriter
from pinaivu_box.engine.image_encoder import ImageEncoded, ImageEncoder
from pinaivu_box.engine.messages import (
    Cancel,
    ListDevices,
    LoadModel,
    Probe,
    Ready,
    SavePrefixes,
    decode_to_engine,
    read_body,
)
from pinaivu_box.engine.one_answer import answer_one, load_failed
from pinaivu_box.engine.patience import set_patience
from pinaivu_box.engine.preparation_queue import PreparationQueue
from pinaivu_box.engine.request_preparer import RequestPreparer
from pinaivu_box.engine.runner import ModelFacts
from pinaivu_box.engine.runners import Runners, load_runners
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import BoxError

if TYPE_CHECKING:
    from pinaivu_box.engine.prefix_store import PrefixStore


@dataclass(frozen=True)
class _StopStringFound:
    """A stop string has ended the sequence of that id."""

    id: str


Work = Sequence | EmbeddingJob | ImageEncoded | Cancel | SavePrefixes | _StopStringFound
Inbox = queue.SimpleQueue[Work]


def main() -> None:
    # Ctrl-C and systemd's SIGTERM reach the whole group; the parent decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.excepthook = _die
    set_patience()  # before a runner loads OpenMP
    # C libraries print; what they print must not land among the frames.
    frames_out = os.dup(1)
    os.dup2(2, 1)
    frames_in = sys.stdin.buffer
    body = read_body(frames_in)
    if body is None:
        return
    load = decode_to_engine(body)
    if isinstance(load, ListDevices | Probe):
        with os.fdopen(frames_out, "wb", buffering=0) as stream:
            answer_one(load, frames_in, stream)
        return
    if not isinstance(load, LoadModel):
        raise BoxError("The first frame of an engine must be LoadModel, ListDevices or Probe.")
    inbox: Inbox = queue.SimpleQueue()
    writer = FrameWriter(frames_out, lambda request_id: inbox.put(_StopStringFound(request_id)))
    preparation: Future[PreparationQueue] = Future()
    # From the beginning: the end of stdin must end us in the middle of loading as well.
    reading = (frames_in, preparation, inbox)
    threading.Thread(target=_read_frames, args=reading, daemon=True).start()
    children = sandboxes.start()  # while the model loads
    try:
        runners = load_runners(load)
        preparer = RequestPreparer(runners.model, children, load)
        preparation.set_result(PreparationQueue(preparer, writer.put, inbox.put))
        images = ImageEncoder(preparer.images, inbox.put) if runners.model.projector else None
        store = _prefix_store(load, runners.model.facts)
        engine = Engine(
            runners.model,
            token_budget=load.token_budget,
            images=images,
            store=store,
            draft=runners.draft,
        )
    except BoxError as error:
        writer.put(load_failed(error))
        writer.close()
        # At a usual exit Python would wait for the thread that reads stdin.
        os._exit(0)
    startup.end()
    writer.put(_ready(runners, preparer.template))
    try:
        run(engine, inbox, writer)
    except BoxError as error:  # a device that fails, say
        sys.stderr.write(f"{error.message}\n")
        sys.stderr.flush()
        os._exit(1)


def run(engine: Engine, inbox: Inbox, writer: FrameWriter) -> None:
    """The loop: sleep when idle, else take what has arrived and compute one step.

    Reading, tokenizing, text and frames are other threads' work, done while C computes; but see
    `FrameWriter.put_step`.
    """
    while True:
        if not engine.busy:
            engine.check_integrity()
            _receive(engine, inbox.get(), writer)
        while not inbox.empty():
            _receive(engine, inbox.get(), writer)
        writer.put_step(engine.step())


def _receive(engine: Engine, item: Work, writer: FrameWriter) -> None:
    if isinstance(item, SavePrefixes):
        writer.put(engine.save_prefixes())
    elif isinstance(item, Sequence | EmbeddingJob):
        engine.add(item)
    elif isinstance(item, ImageEncoded):
        engine.encoded(item)
    else:
        engine.end(item.id, "cancelled" if isinstance(item, Cancel) else "stop")


def _die(failure: threading.ExceptHookArgs) -> None:
    # An engine that has lost a thread would hang: end it, and the box starts a new one.
    traceback.print_exception(failure.exc_value)
    sys.stderr.flush()
    os._exit(1)


def _ready(runners: Runners, template: SandboxedTemplate) -> Ready:
    facts = runners.model.facts
    return Ready(
        build=facts.build,
        device=facts.device,
        context=facts.context,
        kv_tokens=facts.kv_tokens,
        max_sequences=facts.max_sequences,
        defaults=facts.defaults,
        tool_style=template.style.name,
        thinks=template.thinks,
        memory=runners.memory,
        exactness=facts.exactness,
        cpu_variant=facts.cpu_variant,
        vocabulary=facts.n_vocab,
    )


def _prefix_store(load: LoadModel, facts: ModelFacts) -> PrefixStore | None:
    if load.saved is None or not facts.sharing:
        return None
    from pinaivu_box.engine.prefix_store import PrefixStore

    # Only what was computed as this engine computes it.
    exactness = f"\n{facts.exactness}" if facts.exactness else ""
    return PrefixStore(load.saved, f"{facts.build}\n{load.kv_type}\n{facts.cells}{exactness}")


def _read_frames(stream: BinaryIO, preparation: Future[PreparationQueue], inbox: Inbox) -> None:
    while (body := read_body(stream)) is not None:
        message = decode_to_engine(body)
        if isinstance(message, SavePrefixes):
            inbox.put(message)
        elif not isinstance(message, LoadModel | ListDevices | Probe):
            preparation.result().take(message)
    os._exit(0)
