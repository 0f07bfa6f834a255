"""What comes in, in its order; only long prompts are read, and grammars are compiled, beside it, by
threads of their own.

llguidance takes a second for a large schema.  Nobody else's beginning or end waits for that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from pinaivu_box.engine.embeddings import Embedding
from pinaivu_box.engine.intake import Arrival, Intake
from pinaivu_box.engine.messages import Cancel, Refused, Tokenize, Tokenized
from pinaivu_box.engine.reading import Prompt, Reading, name_of
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import NoNodesAvailable

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
        self._reading = Reading(self._read_long)
        self._unread: set[str] = set()  # long prompts that are wanted, waiting or being read
        self._compiling: set[str] = set()
        self._lock = threading.Lock()  # no cancellation overtakes the sequence that it is for
        self._todo: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._compile, name="grammars", daemon=True).start()

    def take(self, message: Prompt | Cancel, *, long: bool = False) -> None:
        """A `long` one is read beside what comes after it."""
        if isinstance(message, Cancel):
            self._cancel(message)
        elif long:
            with self._lock:
                self._unread.add(name_of(message))
            self._reading.put(message)
        else:
            made = self._read(message)
            with self._lock:
                self._go_on(made)

    def _read(self, message: Prompt) -> Arrival | Refused | Tokenized:
        if isinstance(message, Tokenize):
            return self._intake.tokenize(message)
        return self._intake.prepare(message)

    def _read_long(self, message: Prompt) -> None:
        name = name_of(message)
        if name not in self._unread:
            return
        made = self._read(message)
        with self._lock:
            if name in self._unread:  # else it was cancelled meanwhile
                self._unread.remove(name)
                self._go_on(made)

    def _go_on(self, made: Arrival | Refused | Tokenized) -> None:
        self._say(made)
        if not isinstance(made, Arrival):
            return
        if made.compile is None:
            self._schedule(made.sequence)
        else:
            self._compiling.add(made.admitted.id)
            self._todo.put(made)

    def _cancel(self, message: Cancel) -> None:
        with self._lock:
            if message.id in self._unread:
                self._unread.remove(message.id)
                self._reading.drop(message.id)
                why = "The request was stopped before it was read: send it again."
                self._say(Refused(message.id, NoNodesAvailable.code, why))
                return
            self._compiling.discard(message.id)
            self._schedule(message)

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
