"""Writes what an engine says: frames on the pipe to the box."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable

from pinaivu_box.engine.messages import (
    FromEngine,
    LoadFailed,
    PrefixesSaved,
    Ready,
    Refused,
    Tokenized,
    encode,
)
from pinaivu_box.engine.output import OutputBuffer, StepOutput
from pinaivu_box.engine.request_preparer import PreparedRequest

OutputEvent = PreparedRequest | Refused | StepOutput
Event = OutputEvent | Tokenized | Ready | LoadFailed | PrefixesSaved
_FEW = 4  # tokens, whose text and frame take less time than waking another thread


class FrameWriter:
    """Writes to `descriptor`, which it makes non-blocking, in a thread of its own: a full pipe (a
    busy parent) blocks that thread and not the steps, and what they give meanwhile goes into one
    frame.

    The output of a step with few tokens is written by who puts it (`put_step`), if nothing waits to
    be written before it and the pipe has room.  `stopped` is called, in either thread, with the ids
    of sequences that a stop string has ended.
    """

    def __init__(self, descriptor: int, stopped: Callable[[str], None]) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor, self._stopped = descriptor, stopped
        self._events: deque[Event | None] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Of all that follows, and of taking an event out: who has it, and finds none, may write.
        self._lock = threading.Lock()
        self._output = OutputBuffer()
        self._unwritten = b""
        self.thread = threading.Thread(target=self._write_events, daemon=True)
        self.thread.start()

    def put(self, event: Event) -> None:
        """From any thread."""
        self._events.append(event)
        self._wake.put(None)

    def put_step(self, event: StepOutput) -> None:
        """The same of a step."""
        tokens = len(event.sequences) + len(event.plain[1])
        if tokens > _FEW or not self._lock.acquire(blocking=False):
            self.put(event)
            return
        try:
            if self._events or self._unwritten:
                self.put(event)
                return
            self._take(event)
            self._unwritten = rest = self._try_to_write(encode(self._output.frame()))
            if rest:
                self._wake.put(None)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Returns when everything is written."""
        self._events.append(None)
        self._wake.put(None)
        self.thread.join()

    def _take(self, event: OutputEvent) -> None:
        for request_id in self._output.take(event):
            self._stopped(request_id)

    def _write_events(self) -> None:
        while True:
            self._wake.get()
            while not self._wake.empty():  # for what is found now
                self._wake.get()
            with self._lock:
                self._write_all()
                if not self._write_waiting():
                    return

    def _write_waiting(self) -> bool:
        """Returns whether there may be more."""
        taken, events, output = False, self._events, self._output
        while events:
            event = events.popleft()
            if event is None:
                return False
            if isinstance(event, OutputEvent):
                taken = True
                self._take(event)
            else:
                self._write(event)
            if taken and (output.large or not events):
                self._write(output.frame())
                taken = False
        return True

    def _write(self, frame: FromEngine) -> None:
        self._unwritten = self._try_to_write(encode(frame))
        self._write_all()

    def _write_all(self) -> None:
        """Waits for the reader."""
        if not self._unwritten:
            return
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        while self._unwritten:
            room.poll()
            self._unwritten = self._try_to_write(self._unwritten)

    def _try_to_write(self, data: bytes) -> bytes:
        """Returns the rest, for which the pipe has no room."""
        try:
            return data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            os._exit(0)
