"""The life of a request after it was admitted, in a task of its own.

The HTTP handler only listens.  When the client goes away the handler says so and leaves; this task
goes on until the engine has stopped and the receipt is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

from pinaivu_box.engine.messages import Output, Prompt
from pinaivu_box.errors import ApiError, InternalError, TooLate
from pinaivu_box.gateway.activity import Activity
from pinaivu_box.gateway.admission import AdmittedRequest
from pinaivu_box.gateway.backend import Event, stopped
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.metering import Meter
from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.gateway.records import ChoiceRecord, LegRecord, RequestRecord
from pinaivu_box.receipts.receipt import STATISTICAL
from pinaivu_box.settings import LiveSettings
from pinaivu_box.store.keys import Key
from pinaivu_box.transport import wire

log = logging.getLogger("pinaivu.request")

_CANCEL_SECONDS = 10.0
_NEWEST = 0.1  # what the newest request counts in the average of running times


@dataclass(frozen=True)
class ChoiceStarted:
    """A choice's prompt was read, and this is how its text is to be understood.  `fingerprint`
    stands for model file and engine build: the same seed may say something else with another.
    `prompt` is its text, if it is to be echoed; `route` is for the client's eyes."""

    choice: int
    fingerprint: str
    tool_style: str
    thinks: bool
    thinking: bool
    prompt: str = ""
    route: str = ""
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The receipt is on disk; the last thing that a request says if all went well."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    shifted_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    error: ApiError


class ChoiceRun(Protocol):
    """The legs of one choice, one after another."""

    async def run(self) -> str:
        """Returns the finish reason of the last leg.  Raises ApiError."""
        ...

    def cancel(self) -> None:
        """Stop within a step; at any time."""
        ...


class ChoiceRunner(Protocol):
    def start(self, choice: ChoiceRecord, take: Callable[[Event], None]) -> ChoiceRun:
        """What runs the legs of that choice and records them in it.  `take` gets every event of
        those legs."""
        ...


# An Output with a finish reason is the last of its choice.
RequestEvent = ChoiceStarted | Output | Finished | Failed


class Request:
    """One running request.  `events` ends with Finished or Failed."""

    def __init__(self, admitted: AdmittedRequest, runner: ChoiceRunner, meter: Meter) -> None:
        reservation = admitted.reservation
        choices = [ChoiceRecord(job) for job in admitted.jobs]
        self.key = admitted.key
        self.record = RequestRecord(choices, admitted.key.id, admitted.prices, reservation.period)
        self.events: Mailbox[RequestEvent] = Mailbox()
        self.cancelled = False
        self.status = 0  # HTTP's, set when it ends
        self._reservation, self._meter = reservation, meter
        self._refused: ApiError | None = None
        self._wake = asyncio.Event()
        self._runs = [runner.start(choice, partial(self._take, choice)) for choice in choices]

    def cancel(self) -> None:
        """The client is gone: stop within a step, and write the receipt of what was made."""
        self.cancelled = True
        self._wake.set()
        for run in self._runs:
            run.cancel()

    def refuse(self, error: ApiError) -> None:
        """Stop it likewise, and say so to the client at once."""
        if self.status == 0 and self._refused is None:
            self._refused = error
            self.events.put(Failed(error))
            self.cancel()

    def refuse_if_late(self, error: ApiError) -> None:
        """Unless it has begun to answer."""
        if self.record.ttft_ms is None:
            self.refuse(error)

    async def run(self) -> RequestEvent:
        """Returns the last event, which has also been put into `events`."""
        record = self.record
        last: Finished | Failed
        try:
            await self._wait_for_turn()
            last = await self._serve()
        except ApiError as error:
            await self._record_failure()
            last = Failed(error)
        except Exception:
            log.exception("request %s failed", record.job.request_id)
            last = Failed(InternalError("The box failed on this request; its log says why."))
        finally:
            self._reservation.end(record.prompt_tokens + record.completion_tokens, record.cost)
        if self._refused is not None:
            last = Failed(self._refused)
        self._say(last)
        self.status = _status(last, left=self.cancelled and self._refused is None)
        self._log()
        return last

    def _log(self) -> None:
        """One line, when it has ended: JSON has all of it, `terminal_log` what fits a terminal."""
        record = self.record
        fields = {
            "request_id": record.job.request_id,
            "key": record.key_id,
            "key_name": self.key.name or None,
            "model": record.job.model.id,
            "status": self.status,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "tokens_per_s": record.tokens_per_s,
            "legs": len(record.served),
            "served_by": ",".join(dict.fromkeys(map(self._place, record.served))) or None,
            "queue_ms": record.queue_ms,
            "ttft_ms": record.ttft_ms,
            "total_ms": record.elapsed_ms(),
        }
        log.info("request", extra={"fields": fields})

    def _place(self, leg: LegRecord) -> str:
        """Who served a leg: "here", a peer, or an upstream by its name."""
        started = leg.started
        if started.upstream is not None:
            return started.upstream.upstream
        return "here" if started.node_id == self._meter.node_id else wire.short(started.node_id)

    async def _wait_for_turn(self) -> None:
        """For a place among the requests of the same key."""
        turn = self._reservation.turn
        if turn.is_set():
            return
        waits = [asyncio.create_task(event.wait()) for event in (turn, self._wake)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.cancelled:
            raise stopped()

    async def _serve(self) -> Finished:
        record = self.record
        finish_reason = await self._run_choices()
        if not record.served:
            raise stopped()
        await self._meter.record(record, finish_reason, self.key)
        record.metered = True
        return Finished(
            finish_reason,
            record.prompt_tokens,
            record.completion_tokens,
            record.cached_tokens,
            record.shifted_tokens,
        )

    async def _run_choices(self) -> str:
        """Side by side; if one fails, all do."""
        tasks = [asyncio.create_task(run.run()) for run in self._runs]
        try:
            reasons = await asyncio.gather(*tasks)
        except ApiError:
            for run in self._runs:
                run.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return "cancelled" if "cancelled" in reasons else reasons[0]

    def _take(self, choice: ChoiceRecord, event: Event) -> None:
        """An event of one of its legs."""
        if isinstance(event, Output):
            if self.record.ttft_ms is None or event.queue_ms is not None:
                self.record.take(event)
            if self._refused is None:  # as `_say`, once a token
                self.events.put(event)
        elif isinstance(event, Prompt) and len(choice.served) == 1:
            self._say(_started(choice, event))

    def _say(self, event: RequestEvent) -> None:
        """Nothing comes after a refusal, whatever the engine still says."""
        if self._refused is None:
            self.events.put(event)

    async def _record_failure(self) -> None:
        """Tokens that were made and sent are accounted for, even if the rest never came."""
        if self.record.completion_tokens:
            try:
                reason = "cancelled" if self.cancelled else "error"
                await self._meter.record(self.record, reason, self.key)
                self.record.metered = True
            except Exception:
                log.exception("request %s: receipt not written", self.record.job.request_id)


def _started(choice: ChoiceRecord, prompt: Prompt) -> ChoiceStarted:
    leg = choice.legs[-1]
    started = leg.started
    exact = "" if started.exactness == STATISTICAL else started.exactness
    system = f"{started.model_digest} {started.engine.build} {exact}".rstrip().encode()
    return ChoiceStarted(
        choice=choice.job.choice,
        fingerprint=f"fp_{hashlib.sha256(system).hexdigest()[:12]}",
        tool_style=started.tool_style,
        thinks=started.thinks,
        thinking=prompt.thinking,
        prompt=prompt.text,
        route=leg.header,
        prompt_tokens=leg.prompt_tokens,
    )


def _status(last: RequestEvent, *, left: bool) -> int:
    if isinstance(last, Failed):
        return 499 if left else last.error.status
    return 499 if isinstance(last, Finished) and last.finish_reason == "cancelled" else 200


def too_late(wait: float, timeout: float) -> TooLate:
    """`wait` and `timeout` in seconds."""
    return TooLate(
        f"The request cannot start within {timeout:g} s: it would wait about {wait:.1f} s.  Try "
        "again later, or with a longer timeout.",
        retry_after=max(1, math.ceil(wait - timeout)),
    )


class RunningRequests:
    """All requests of this box that are not finished; a box with peers replaces `runner`.

    `places` says how many sequences of a model run at a time.  `receipted` is told of each request
    that has its receipt.
    """

    def __init__(
        self, runner: ChoiceRunner, meter: Meter, metrics: Metrics, settings: LiveSettings
    ) -> None:
        self.runner = runner
        self.places: Callable[[str], int] = lambda _: settings.config.engine.max_sequences
        self.activity = Activity()
        self.receipted: Callable[[RequestRecord, Key], None] = lambda _record, _key: None
        # Told of each that has ended: its record, HTTP's status, the code of its error.
        self.ended: Callable[[RequestRecord, int, str], None] = lambda _record, _status, _code: None
        self._meter, self._metrics = meter, metrics
        self._running: dict[asyncio.Task[RequestEvent], Request] = {}
        self._stopped: dict[str, tuple[float, ApiError]] = {}
        self._by_model: Counter[str] = Counter()
        self._service: dict[str, float] = {}  # seconds that a model's request runs, on average

    @property
    def count(self) -> int:
        return len(self._running)

    def oldest(self, limit: int) -> list[Request]:
        """At most so many of those that run or wait, in the order in which they came."""
        return list(islice(self._running.values(), limit))

    def in_flight(self, model_id: str) -> int:
        return self._by_model[model_id]

    def start(
        self,
        admitted: AdmittedRequest,
        timeout: float | None = None,
        waited: float = 0.0,
        since: float = math.inf,
    ) -> Request:
        """With a `timeout` (seconds, of which it has `waited` some) it is refused if it has not
        begun to answer by then, or at once if that is to be expected.  Raises TooLate, and what its
        key was stopped with if that was after `since` (monotonic), when the request came."""
        when, error = self._stopped.get(admitted.key.id, (-math.inf, None))
        if error is not None and when >= since:
            admitted.reservation.end(0, 0)
            raise error
        model_id, count = admitted.jobs[0].model.id, len(admitted.jobs)
        wait = waited + self._expected_wait(admitted)
        if timeout is not None and wait > timeout:
            admitted.reservation.end(0, 0)
            raise too_late(wait, timeout)
        request = Request(admitted, self.runner, self._meter)
        task = asyncio.create_task(request.run())
        if timeout is not None:
            late = too_late(max(wait, timeout), timeout)
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout - waited, request.refuse_if_late, late)
            task.add_done_callback(lambda _: timer.cancel())
        self._running[task] = request
        self._by_model[model_id] += count
        task.add_done_callback(self._end)
        self.activity.begun()
        return request

    def stop_key(self, key_id: str, error: ApiError) -> int:
        """Refuse what runs for a key, and what has come and is not admitted yet; how many run."""
        self._stopped[key_id] = time.monotonic(), error
        requests = [
            request for request in self._running.values() if request.record.key_id == key_id
        ]
        for request in requests:
            request.refuse(error)
        return len(requests)

    def stop_account(self, account_id: str, error: ApiError) -> None:
        """Refuse what runs for an account."""
        for request in list(self._running.values()):
            if request.key.account_id == account_id:
                request.refuse(error)

    def _expected_wait(self, admitted: AdmittedRequest) -> float:
        """Seconds until it starts, if those before it take as long as others did lately."""
        model_id = admitted.jobs[0].model.id
        seconds = self._service.get(model_id, 0.0)
        sequences = self.places(model_id)
        before = self._by_model[model_id] + len(admitted.jobs) - sequences
        wait = 0.0 if admitted.elsewhere else max(0, before) * seconds / sequences
        ahead, places = admitted.reservation.ahead, admitted.key.policy.max_parallel or 1
        return max(wait, ahead * seconds / places)

    def _end(self, task: asyncio.Task[RequestEvent]) -> None:
        request = self._running.pop(task)
        record = request.record
        model_id = record.job.model.id
        self._by_model[model_id] -= len(record.choices)
        if record.queue_ms is not None:
            ran = (record.elapsed_ms() - record.queue_ms) / 1000
            before = self._service.get(model_id, ran)
            self._service[model_id] = before + (ran - before) * _NEWEST
        self._metrics.observe(record, request.status)
        last = None if task.cancelled() or task.exception() else task.result()
        code = last.error.code if isinstance(last, Failed) else ""
        self.ended(record, request.status, code)
        self.activity.ended(record, request.key, request.status)
        if record.metered:
            self.receipted(record, request.key)

    async def drained(self) -> None:
        """Wait until none is left."""
        while self._running:
            await asyncio.wait(self._running)

    async def cancel_all(self) -> None:
        """Stop what is left and wait until its receipts are written."""
        for request in self._running.values():
            request.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=_CANCEL_SECONDS)
