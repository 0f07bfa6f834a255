"""What comes in, on its way to the engine: prepared by a few threads that tenants share fairly.

Preparing (template, tokens) and compiling a grammar can take long, and both can be made to take
long.  So the thread that reads frames does neither, one tenant has one request prepared and one
grammar compiled at a time, and a cancellation ends whichever it finds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.messages import Add, Cancel, Embed, Named, Refused, Tokenize, Tokenized
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.turns import Turns
from pinaivu_box.errors import BadRequest
from pinaivu_box.sandbox import Cancellation

_PREPARING = 4  # threads; most of the time they wait for a sandbox
_COMPILING = 2


class _Request(Cancellation):
    """One that is not scheduled yet.  Once it is `admitted`, the output knows it."""

    def __init__(self, request_id: str, tenant: str) -> None:
        super().__init__()
        self.id = request_id
        self.tenant = tenant
        self.admitted = False


class PreparationQueue:
    """`say` is told first of whatever `schedule` gets.  `take` is called by one thread; it never
    blocks."""

    def __init__(
        self,
        intake: RequestPreparer,
        say: Callable[[PreparedRequest | Refused | Tokenized], None],
        schedule: Callable[[Sequence | EmbeddingJob | Cancel], None],
    ) -> None:
        self._intake = intake
        self._say = say
        self._schedule = schedule
        self._open: dict[str, _Request] = {}
        self._lock = threading.Lock()  # no cancellation overtakes the sequence that it is for
        self._preparing = Turns(_PREPARING, "arrivals")
        self._compiling = Turns(_COMPILING, "grammars")

    def take(self, message: Add | Embed | Tokenize | Cancel | Named) -> None:
        if isinstance(message, Named):
            self._intake.name(message)
            return
        if isinstance(message, Cancel):
            self._cancel(message)
            return
        asked = message.add if isinstance(message, Tokenize) else message
        request = _Request(asked.id, asked.tenant)
        with self._lock:
            self._open[request.id] = request
        self._preparing.put(request.tenant, lambda: self._prepare(request, message))

    def _cancel(self, message: Cancel) -> None:
        with self._lock:
            request = self._open.pop(message.id, None)
            if request is None or request.admitted:
                self._schedule(message)
            else:  # the output knows nothing of it that could end
                why = "The request was cancelled before it had begun."
                self._say(Refused(message.id, BadRequest.code, why))
        if request is not None:
            request.cancel()

    def _prepare(self, request: _Request, message: Add | Embed | Tokenize) -> None:
        if request.cancelled:
            return
        if isinstance(message, Tokenize):
            self._end(request, self._intake.tokenize(message, request))
            return
        prepared = self._intake.prepare(message, request)
        if isinstance(prepared, Refused) or prepared.compile is None:
            self._end(request, prepared)
            return
        with self._lock:
            if self._open.get(request.id) is not request:
                return
            self._say(prepared)
            request.admitted = True
        self._compiling.put(request.tenant, lambda: self._compile(request, prepared))

    def _compile(self, request: _Request, arrival: PreparedRequest) -> None:
        if request.cancelled or arrival.compile is None:
            return
        self._end(request, arrival.compile() or arrival)

    def _end(self, request: _Request, outcome: PreparedRequest | Refused | Tokenized) -> None:
        """It is known what becomes of it; unless it was cancelled meanwhile."""
        with self._lock:
            if self._open.get(request.id) is not request:
                return
            del self._open[request.id]
            if not (request.admitted and isinstance(outcome, PreparedRequest)):
                self._say(outcome)
            if isinstance(outcome, PreparedRequest):
                self._schedule(outcome.sequence)
