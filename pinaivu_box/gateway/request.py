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
from typing import Protocol

from pinaivu_box.engine.messages import Output
from pinaivu_box.errors import ApiError, InternalError, TooLate
from pinaivu_box.gateway.admission import AdmittedRequest
from pinaivu_box.gateway.backend import Event, Prompt, stopped
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.metering import Meter
from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.gateway.records import ChoiceRecord, RequestRecord
from pinaivu_box.settings import LiveSettings

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
        self.account = RequestRecord(
            admitted.jobs, admitted.key.id, admitted.prices, reservation.period
        )
        self.events: Mailbox[RequestEvent] = Mailbox()
        self.cancelled = False
        self.status = 0  # HTTP's, set when it ends
        self._reservation, self._meter = reservation, meter
        self._refused: ApiError | None = None
        self._wake = asyncio.Event()
        self._runs = [self._run_of(choice, runner) for choice in self.account.choices]

    def _run_of(self, choice: ChoiceRecord, runner: ChoiceRunner) -> ChoiceRun:
        return runner.start(choice, lambda event: self._take(choice, event))

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
        if self.account.ttft_ms is None:
            self.refuse(error)

    async def run(self) -> RequestEvent:
        """Returns the last event, which has also been put into `events`."""
        last: RequestEvent
        try:
            await self._wait_for_turn()
            last = await self._serve_and_settle()
        except ApiError as error:
            await self._settle_failure()
            last = Failed(error)
        except Exception:
            log.exception("request %s failed", self.account.job.request_id)
            last = Failed(InternalError("The box failed on this request; its log says why."))
        finally:
            account = self.account
            tokens = account.prompt_tokens + account.completion_tokens
            self._reservation.settle(tokens, account.cost)
        if self._refused is not None:
            last = Failed(self._refused)
        self._say(last)
        self.status = _status(last, left=self.cancelled and self._refused is None)
        _log(self.account, self.status)
        return last

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

    async def _serve_and_settle(self) -> RequestEvent:
        account = self.account
        finish_reason = await (self._run_all() if len(self._runs) > 1 else self._runs[0].run())
        if not account.served:
            raise stopped()
        await self._meter.settle(account, finish_reason)
        return Finished(
            finish_reason,
            account.prompt_tokens,
            account.completion_tokens,
            account.cached_tokens,
            account.shifted_tokens,
        )

    async def _run_all(self) -> str:
        """All choices side by side; if one fails, all do."""
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
            self.account.take(event)
            self._say(event)
        elif isinstance(event, Prompt) and len(choice.served) == 1:
            self._say(_started(choice, event))

    def _say(self, event: RequestEvent) -> None:
        """Nothing comes after a refusal, whatever the engine still says."""
        if self._refused is None:
            self.events.put(event)

    async def _settle_failure(self) -> None:
        """Tokens that were made and sent are accounted for, even if the rest never came."""
        if self.account.completion_tokens:
            try:
                await self._meter.settle(self.account, "cancelled" if self.cancelled else "error")
            except Exception:
                log.exception("request %s: receipt not written", self.account.job.request_id)


def _started(choice: ChoiceRecord, prompt: Prompt) -> ChoiceStarted:
    leg = choice.legs[-1]
    started = leg.started
    system = f"{started.model_digest} {started.engine.build}".encode()
    return ChoiceStarted(
        choice=choice.job.choice,
        fingerprint=f"fp_{hashlib.sha256(system).hexdigest()[:12]}",
        tool_style=started.tool_style,
        thinks=started.thinks,
        thinking=prompt.thinking,
        prompt=prompt.text,
        route=leg.header,
        prompt_tokens=len(prompt.tokens),
    )


def _status(last: RequestEvent, *, left: bool) -> int:
    if isinstance(last, Failed):
        return 499 if left else last.error.status
    return 499 if isinstance(last, Finished) and last.finish_reason == "cancelled" else 200


def _log(account: RequestRecord, status: int) -> None:
    log.info(
        "request",
        extra={
            "fields": {
                "request_id": account.job.request_id,
                "key": account.key_id,
                "model": account.job.model.id,
                "status": status,
                "prompt_tokens": account.prompt_tokens,
                "cached_tokens": account.cached_tokens,
                "completion_tokens": account.completion_tokens,
                "legs": len(account.served),
                "queue_ms": account.queue_ms,
                "ttft_ms": account.ttft_ms,
                "total_ms": account.elapsed_ms(),
            }
        },
    )


def too_late(wait: float, timeout: float) -> TooLate:
    """`wait` and `timeout` in seconds."""
    return TooLate(
        f"The request cannot start within {timeout:g} s: it would wait about {wait:.1f} s.  Try "
        "again later, or with a longer timeout.",
        retry_after=max(1, math.ceil(wait - timeout)),
    )


class RunningRequests:
    """All requests of this box that are not finished."""

    def __init__(
        self,
        runner: ChoiceRunner,
        meter: Meter,
        metrics: Metrics,
        settings: LiveSettings,
    ) -> None:
        self._settings = settings
        self._elsewhere: Callable[[str], bool] = lambda _: False
        self._runner, self._meter, self._metrics = runner, meter, metrics
        self._running: dict[asyncio.Task[RequestEvent], Request] = {}
        self._stopped: dict[str, tuple[float, ApiError]] = {}
        self._by_model: Counter[str] = Counter()
        self._service: dict[str, float] = {}  # seconds that a model's request runs, on average

    def use(self, runner: ChoiceRunner, elsewhere: Callable[[str], bool]) -> None:
        """Run legs with that runner from now on; `elsewhere` tells whether peers have a model."""
        self._runner, self._elsewhere = runner, elsewhere

    @property
    def count(self) -> int:
        return len(self._running)

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
            admitted.reservation.settle(0, 0)
            raise error
        model_id, count = admitted.jobs[0].model.id, len(admitted.jobs)
        wait = waited + self._expected_wait(admitted)
        if timeout is not None and wait > timeout:
            admitted.reservation.settle(0, 0)
            raise too_late(wait, timeout)
        request = Request(admitted, self._runner, self._meter)
        task = asyncio.create_task(request.run())
        if timeout is not None:
            late = too_late(max(wait, timeout), timeout)
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout - waited, request.refuse_if_late, late)
            task.add_done_callback(lambda _: timer.cancel())
        self._running[task] = request
        self._by_model[model_id] += count
        task.add_done_callback(self._end)
        return request

    def stop_key(self, key_id: str, error: ApiError) -> int:
        """Refuse what runs for a key, and what has come and is not admitted yet; how many run."""
        self._stopped[key_id] = time.monotonic(), error
        requests = [
            request for request in self._running.values() if request.account.key_id == key_id
        ]
        for request in requests:
            request.refuse(error)
        return len(requests)

    def _expected_wait(self, admitted: AdmittedRequest) -> float:
        """Seconds until it starts, if those before it take as long as others did lately."""
        model_id = admitted.jobs[0].model.id
        seconds = self._service.get(model_id, 0.0)
        sequences = self._settings.config.engine.max_sequences  # that run at a time
        before = self._by_model[model_id] + len(admitted.jobs) - sequences
        if self._elsewhere(model_id):
            before = 0
        wait = max(0, before) * seconds / sequences
        ahead, places = admitted.reservation.ahead, admitted.key.policy.max_parallel or 1
        return max(wait, ahead * seconds / places)

    def _end(self, task: asyncio.Task[RequestEvent]) -> None:
        request = self._running.pop(task)
        jobs, model_id = request.account.jobs, request.account.job.model.id
        self._by_model[model_id] -= len(jobs)
        if request.account.queue_ms is not None:
            ran = (request.account.elapsed_ms() - request.account.queue_ms) / 1000
            before = self._service.get(model_id, ran)
            self._service[model_id] = before + (ran - before) * _NEWEST
        self._metrics.observe(request.account, request.status)

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
