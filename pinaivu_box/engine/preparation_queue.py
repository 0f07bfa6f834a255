"""Requests on their way to the engine: prepared by a few threads that tenants share fairly.

Preparing (template, tokens) and compiling a grammar can take long, and both can be made to take
long.  So the thread that reads frames does neither, one tenant has one request prepared and one
grammar compiled at a time, and a cancellation ends either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.messages import Add, Cancel, Embed, Named, Refused, Tokenize, Tokenized
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import BadRequest
from pinaivu_box.fair_threads import FairThreads
from pinaivu_box.sandbox import Cancellation

_PREPARING_THREADS = 4  # most of the time they wait for a sandbox
_COMPILING_THREADS = 2


class _Request(Cancellation):
    """One that is not scheduled yet.  Once it is `admitted`, the output buffer knows it."""

    def __init__(self, request_id: str, tenant: str) -> None:
        super().__init__()
        self.id = request_id
        self.tenant = tenant
        self.admitted = False


class PreparationQueue:
    """Prepares requests, reports what became of them by `report`, and then calls `schedule`.
    `take` is called by one thread; it never blocks."""

    def __init__(
        self,
        preparer: RequestPreparer,
        report: Callable[[PreparedRequest | Refused | Tokenized], None],
        schedule: Callable[[Sequence | EmbeddingJob | Cancel], None],
    ) -> None:
        self._preparer = preparer
        self._report = report
        self._schedule = schedule
        self._open: dict[str, _Request] = {}
        self._lock = threading.Lock()  # no cancellation overtakes the sequence that it is for
        self._preparing = FairThreads(_PREPARING_THREADS, "preparing")
        self._compiling = FairThreads(_COMPILING_THREADS, "grammars")

    def take(self, message: Add | Embed | Tokenize | Cancel | Named) -> None:
        if isinstance(message, Named):
            self._preparer.set_named_prefixes(message.texts)
            return
        if isinstance(message, Cancel):
            self._cancel(message)
            return
        asked = message.request if isinstance(message, Tokenize) else message
        request = _Request(asked.id, asked.tenant)
        with self._lock:
            self._open[request.id] = request
        self._preparing.put(request.tenant, lambda: self._prepare(request, message))

    def _cancel(self, message: Cancel) -> None:
        with self._lock:
            request = self._open.pop(message.id, None)
            if request is None or request.admitted:
                self._schedule(message)
            else:  # the output buffer knows no sequence that could end
                why = "The request was cancelled before it had begun."
                self._report(Refused(message.id, BadRequest.code, why))
        if request is not None:
            request.cancel()

    def _prepare(self, request: _Request, message: Add | Embed | Tokenize) -> None:
        if request.cancelled:
            return
        if isinstance(message, Tokenize):
            self._finish(request, self._preparer.tokenize(message, request))
            return
        prepared = self._preparer.prepare(message, request)
        if isinstance(prepared, Refused) or prepared.compile is None:
            self._finish(request, prepared)
            return
        with self._lock:
            if self._open.get(request.id) is not request:
                return
            self._report(prepared)
            request.admitted = True
        self._compiling.put(request.tenant, lambda: self._compile(request, prepared))

    def _compile(self, request: _Request, prepared: PreparedRequest) -> None:
        if request.cancelled or prepared.compile is None:
            return
        self._finish(request, prepared.compile() or prepared)

    def _finish(self, request: _Request, outcome: PreparedRequest | Refused | Tokenized) -> None:
        """Report and schedule the outcome, unless the request was cancelled meanwhile."""
        with self._lock:
            if self._open.get(request.id) is not request:
                return
            del self._open[request.id]
            if not (request.admitted and isinstance(outcome, PreparedRequest)):
                self._report(outcome)
            if isinstance(outcome, PreparedRequest):
                self._schedule(outcome.sequence)
