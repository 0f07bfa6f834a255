"""The life of a request after it was admitted, in a task of its own.

The HTTP handler only listens.  When the client goes away the handler says so and leaves; this task
goes on until the engine has stopped and the receipt is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import Counter
from dataclasses import dataclass

from pinaivu_box.errors import ApiError, EngineLost, InternalError
from pinaivu_box.gateway.backend import Backend, Job, Output, Prompt, Started
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.metering import Account, Branch, Meter
from pinaivu_box.gateway.metrics import Metrics

log = logging.getLogger("pinaivu.request")

MAX_LEGS = 3
_CANCEL_SECONDS = 10.0


@dataclass(frozen=True)
class Begun:
    """A choice's prompt was read, and this is how its text is to be understood.  `fingerprint`
    stands for model file and engine build: the same seed may say something else with another."""

    choice: int
    fingerprint: str
    tool_style: str
    thinks: bool
    thinking: bool


@dataclass(frozen=True)
class Said:
    """Output of one choice; with a finish reason it is the choice's last."""

    choice: int
    output: Output


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


RequestEvent = Begun | Said | Finished | Failed


class Request:
    """One running request.  `events` ends with Finished or Failed."""

    def __init__(self, account: Account, backend: Backend, meter: Meter) -> None:
        self.account = account
        self.events: Mailbox[RequestEvent] = Mailbox()
        self.cancelled = False
        self.status = 500  # set when it ends
        self._backend = backend
        self._meter = meter

    def cancel(self) -> None:
        """The client is gone: stop within a step, and write the receipt of what was made."""
        self.cancelled = True
        for job in self.account.jobs:
            self._backend.cancel(job)

    async def run(self) -> RequestEvent:
        """Returns the last event, which has also been put into `events`."""
        try:
            last = await self._serve_and_settle()
        except ApiError as error:
            await self._settle_failure()
            last = Failed(error)
        except Exception:
            log.exception("request %s failed", self.account.job.request_id)
            last = Failed(InternalError("The box failed on this request; its log says why."))
        self.status = _status(last)
        self.events.put(last)
        _log(self.account, self.status)
        return last

    async def _serve_and_settle(self) -> RequestEvent:
        account = self.account
        if len(account.branches) == 1:
            finish_reason = await self._serve_legs(account.branches[0])
        else:
            finish_reason = await self._serve_all()
        await self._meter.settle(account, finish_reason)
        return Finished(
            finish_reason,
            account.prompt_tokens,
            account.completion_tokens,
            account.cached_tokens,
            account.shifted_tokens,
        )

    async def _serve_all(self) -> str:
        """All choices side by side; if one fails, all do."""
        tasks = [asyncio.create_task(self._serve_legs(branch)) for branch in self.account.branches]
        try:
            reasons = await asyncio.gather(*tasks)
        except ApiError:
            for job in self.account.jobs:
                self._backend.cancel(job)
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return "cancelled" if "cancelled" in reasons else reasons[0]

    async def _serve_legs(self, branch: Branch) -> str:
        for legs in range(1, MAX_LEGS + 1):
            try:
                return await self._serve(branch)
            except EngineLost:
                # What was said stays said: the next leg goes on after it with the same seed.
                if legs == MAX_LEGS or self.cancelled:
                    raise
        raise AssertionError("unreachable")

    async def _serve(self, branch: Branch) -> str:
        job, account = branch.job, self.account
        async with contextlib.aclosing(self._backend.serve(job, branch.made)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Started):
                    account.start_leg(branch, event)
                    if self.cancelled:  # while the engine was starting
                        self._backend.cancel(job)
                    continue
                account.take(branch, event)
                if isinstance(event, Prompt):
                    if len(branch.served) == 1:
                        self._begin(branch, event)
                    continue
                self.events.put(Said(job.choice, event))
                if event.finish_reason:
                    return event.finish_reason
        raise EngineLost("The engine ended this request without a word; try again.")

    def _begin(self, branch: Branch, prompt: Prompt) -> None:
        started = branch.legs[-1].started
        system = f"{started.model_digest} {started.engine.build}".encode()
        fingerprint = f"fp_{hashlib.sha256(system).hexdigest()[:12]}"
        style, thinks = started.tool_style, started.thinks
        self.events.put(Begun(branch.job.choice, fingerprint, style, thinks, prompt.thinking))

    async def _settle_failure(self) -> None:
        """Tokens that were made and sent are accounted for, even if the rest never came."""
        if self.account.completion_tokens:
            try:
                await self._meter.settle(self.account, "cancelled" if self.cancelled else "error")
            except Exception:
                log.exception("request %s: receipt not written", self.account.job.request_id)


def _status(last: RequestEvent) -> int:
    if isinstance(last, Failed):
        return last.error.status
    return 499 if isinstance(last, Finished) and last.finish_reason == "cancelled" else 200


def _log(account: Account, status: int) -> None:
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


class Requests:
    """All requests of this box that are not finished."""

    def __init__(self, backend: Backend, meter: Meter, metrics: Metrics) -> None:
        self._backend = backend
        self._meter = meter
        self._metrics = metrics
        self._running: dict[asyncio.Task[RequestEvent], Request] = {}
        self._by_model: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return len(self._running)

    def in_flight(self, model_id: str) -> int:
        return self._by_model[model_id]

    def start(self, jobs: list[Job], key_id: str) -> Request:
        """A request that is answered by these jobs, one for each of its choices."""
        request = Request(Account(jobs, key_id), self._backend, self._meter)
        task = asyncio.create_task(request.run())
        self._running[task] = request
        self._by_model[jobs[0].model.id] += len(jobs)
        task.add_done_callback(self._end)
        return request

    def _end(self, task: asyncio.Task[RequestEvent]) -> None:
        request = self._running.pop(task)
        jobs = request.account.jobs
        self._by_model[jobs[0].model.id] -= len(jobs)
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
