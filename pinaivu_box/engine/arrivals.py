"""What comes in, in its order; only grammars are compiled beside it, by threads of their own.

llguidance takes a second for a large schema.  Nobody else's beginning or end waits for that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from pinaivu_box.engine.embeddings import Embedding
from pinaivu_box.engine.intake import Arrival, Intake
from pinaivu_box.engine.messages import Add, Cancel, Embed, Named, Refused, Tokenize, Tokenized
from pinaivu_box.engine.sequence import Sequence

_THREADS = 2  # so that a small schema need not wait for a large one


class Arrivals:
    """`say` is told first of whatever `schedule` gets.  `take` is called by one thread."""

    def __init__(
        self,
        intake: Intake,
        say: Callable[[Arrival | Refused | Tokenized], None],
        schedule: Callable[[Sequence | Embedding | Cancel], None],
    ) -> None:
        self._intake = intake
        self._say = say
        self._schedule = schedule
        self._compiling: set[str] = set()
        self._lock = threading.Lock()  # no cancellation overtakes the sequence that it is for
        self._todo: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._compile, name="grammars", daemon=True).start()

    def take(self, message: Add | Embed | Tokenize | Cancel | Named) -> None:
        if isinstance(message, Tokenize):
            self._say(self._intake.tokenize(message))
        elif isinstance(message, Named):
            self._intake.name(message)
        elif isinstance(message, Cancel):
            with self._lock:
                self._compiling.discard(message.id)
                self._schedule(message)
        else:
            self._prepare(message)

    def _prepare(self, message: Add | Embed) -> None:
        prepared = self._intake.prepare(message)
        self._say(prepared)
        if isinstance(prepared, Refused):
            return
        if prepared.compile is None:
            self._schedule(prepared.sequence)
        else:
            self._compiling.add(message.id)
            self._todo.put(prepared)

    def _compile(self) -> None:
        while True:
            arrival = self._todo.get()
            name = arrival.admitted.id
            if arrival.compile is None or name not in self._compiling:
                continue
            refused = arrival.compile()
            with self._lock:
                if name not in self._compiling:
                    continue  # it was cancelled meanwhile
                self._compiling.remove(name)
                if refused is None:
                    self._schedule(arrival.sequence)
                else:
                    self._say(refused)
