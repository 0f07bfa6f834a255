"""Runs a choice leg by leg.  Decided here: which box is asked next, when a second one is asked as
well, how long a begun answer waits for a box that goes on with it, and how many legs there may be.

Before the first output another box may take over, and nobody sees that.  After it the answer goes
on with the next leg, from the tokens that were made and with the same seed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from pinaivu_box.engine.messages import Output, Prompt
from pinaivu_box.errors import ApiError, EngineLost, NoNodesAvailable
from pinaivu_box.gateway.backend import Backend, Event, Job, Started, stopped
from pinaivu_box.gateway.records import ChoiceRecord, FailedLeg, LegRecord
from pinaivu_box.legs.boxes import Boxes, ChosenBox
from pinaivu_box.receipts.commitment import Extras
from pinaivu_box.tasks import TaskSet, ignore_exception

log = logging.getLogger("pinaivu.legs")

MAX_LEGS = 8
MAX_OWN_LEGS = 3  # an engine here that dies so often will die again
_PATIENCE_SECONDS = 15.0  # that a begun answer waits for a box that goes on with it
_RETRY_SECONDS = 1.0  # after which an answer that waits may ask a box again that did not serve

Deliver = Callable[[LegRecord, Event], None]


class LegRunner:
    """`local` serves all legs, unless there are `boxes` to choose from."""

    def __init__(self, node_id: str, local: Backend, boxes: Boxes | None = None) -> None:
        self.node_id, self.local, self.boxes = node_id, local, boxes
        self.leaving = TaskSet()  # legs of which another box was quicker

    def start(self, choice: ChoiceRecord, take: Callable[[Event], None]) -> LegRun:
        """See `gateway.request.ChoiceRunner`."""
        return LegRun(self, choice, take)


class LegRun:
    """The legs of one choice.  `attempts` are those that run."""

    def __init__(
        self, runner: LegRunner, choice: ChoiceRecord, take: Callable[[Event], None]
    ) -> None:
        self.attempts: list[LegAttempt] = []
        self.cancelled = False
        self._runner, self._choice, self._take = runner, choice, take

    def cancel(self) -> None:
        self.cancelled = True
        for attempt in self.attempts:
            attempt.leg.cancel()
        if self._runner.boxes is not None:
            self._runner.boxes.candidates.changes.notify()  # it may wait for one of them

    async def run(self) -> str:
        own_losses = 0
        for legs in range(1, MAX_LEGS + 1):
            try:
                return await self._run_leg(self._choice.next_job())
            except EngineLost as error:
                own_losses += not error.node_id
                if own_losses == MAX_OWN_LEGS or legs == MAX_LEGS or self.cancelled:
                    raise
                if self._choice.has_upstream_output:
                    raise
                self._choice.lost_at(error.node_id)
        raise AssertionError("unreachable")

    async def _run_leg(self, job: Job) -> str:
        """Returns the finish reason.  Raises EngineLost if another leg may go on."""
        boxes = self._runner.boxes
        if boxes is None or not boxes.may_choose(job):
            # Nobody else could take over: nothing need be held back.
            job = job.as_leg()
            leg = self._runner.local.start(job)
            attempt = self.attempt(ChosenBox(self._runner.node_id, leg, job))
            attempt.deliver_to(self._deliver, self._take)
            try:
                return await attempt.run()
            finally:
                self.attempts.clear()
        chosen: LegAttempt | None = None
        try:
            chosen = await _BoxSearch(self, boxes, job).first_to_answer()
            await self._leave_all_but(chosen)
            chosen.deliver_to(self._deliver, self._take)
            return await chosen.task
        finally:
            if chosen is not None:
                await chosen.close()
            await self._leave_all_but(chosen)
            self.attempts.clear()

    def attempt(self, box: ChosenBox) -> LegAttempt:
        """Have that box serve the leg."""
        choice = self._choice
        attempt = LegAttempt(box, choice.extras if choice.served else None, choice.failures.append)
        self.attempts.append(attempt)
        if self.cancelled:
            attempt.leg.cancel()
        return attempt

    def _deliver(self, record: LegRecord, event: Event) -> None:
        if isinstance(event, Output):
            if event.finish_reason == "cancelled" and not record.begun:
                self._choice.legs.pop()  # it only waited: there is nothing to pay for
        elif isinstance(event, Started):
            self._choice.begin(record)
        elif isinstance(event, Prompt):
            self._choice.read(event)
        self._take(event)

    async def _leave_all_but(self, chosen: LegAttempt | None) -> None:
        """What a peer has computed until it hears that another was quicker is owed to it: it is
        told to stop, and its proof is accepted, while the request goes on."""
        for attempt in self.attempts.copy():
            if attempt is chosen:
                continue
            self.attempts.remove(attempt)
            if attempt.box.is_peer:
                attempt.leg.cancel()
                self._runner.leaving.add(attempt.task)
            else:
                await attempt.close()


class LegAttempt:
    """A leg at one box.  Its events are kept until it is known to whom they are delivered.

    `outcome` is None at its first output, and before that the error that ended it.
    """

    def __init__(
        self, box: ChosenBox, earlier: Extras | None, failed: Callable[[FailedLeg], None]
    ) -> None:
        self.box, self.leg = box, box.leg
        self._choice = box.job.choice
        self._failed = failed
        self.outcome: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.task: asyncio.Task[str]
        self.record: LegRecord | None = None
        self._finish_reason: str | None = None
        self._has_answered = False
        self._earlier = earlier
        self._kept: list[Event] = []
        self._deliver: Deliver = lambda record, event: self._kept.append(event)
        self._deliver_more: Callable[[Event], None] = self._kept.append

    def begin(self) -> None:
        """Run in a task of its own."""
        self.task = asyncio.create_task(self.run())
        self.task.add_done_callback(ignore_exception)

    def deliver_to(self, deliver: Deliver, deliver_more: Callable[[Event], None]) -> None:
        """What was kept, and what comes; outputs after the first, up to the last, go to
        `deliver_more`, which is the shorter way."""
        self._deliver, self._deliver_more = deliver, deliver_more
        for event in self._kept:
            assert self.record is not None  # it has begun
            deliver(self.record, event)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    async def run(self) -> str:
        """Returns the finish reason; "cancelled" also if there was no event at all."""
        outcome: BaseException | None = None
        try:
            return await self._run()
        except BaseException as error:
            outcome = error
            if isinstance(error, ApiError):
                self.box.failed(error)
                if not self._has_answered:
                    box = self.box
                    self._failed(FailedLeg(box.job, box.node_id, time.time(), error.code))
            raise
        finally:
            self.box.release(self.record)
            if not self.outcome.done():
                self.outcome.set_result(outcome)

    async def _run(self) -> str:
        await self.leg.run(self._take)
        if self.record is None:
            return "cancelled"
        if self._finish_reason is None:
            raise EngineLost("The engine ended this request without an answer; try again.")
        return self._finish_reason

    def _take(self, event: Event) -> None:
        record = self.record
        if self._has_answered and isinstance(event, Output) and event.finish_reason is None:
            assert record is not None  # once a token
            record.take_output(event)
            if self._choice:
                event.choice = self._choice
            self._deliver_more(event)
            return
        if isinstance(event, Started):
            box = self.box
            record = LegRecord(box.job, event, self._earlier, box.route, box.header)
            self.record = record
        else:
            assert record is not None  # it has begun
            record.take(event)
        if not isinstance(event, Output):
            self._deliver(record, event)
            return
        if self._choice:
            event.choice = self._choice
        if event.finish_reason is not None:
            self._finish_reason = event.finish_reason
            self.box.served(record)
        self._deliver(record, event)
        if not self._has_answered:
            self._has_answered = True
            self.outcome.set_result(None)


class _BoxSearch:
    """For a box that answers: several are asked, one after another or side by side."""

    def __init__(self, run: LegRun, boxes: Boxes, job: Job) -> None:
        self._run, self._boxes, self._job = run, boxes, job
        now = time.monotonic()
        self._deadline = now + _PATIENCE_SECONDS
        self._tried = dict.fromkeys(job.tried, now)  # node ids, and when
        self._error: ApiError | None = None  # why one of them did not serve
        self._faults = 0  # how many say that the request itself is at fault

    async def first_to_answer(self) -> LegAttempt:
        """Raises NoNodesAvailable if none does, EngineLost if that was an engine here, and what
        boxes have found wrong with the request."""
        attempts = self._run.attempts
        while True:
            while not attempts:
                await self._ask_next()
            if len(attempts) == 1 and not await self._answers_in_time(attempts[0]):
                await self._ask_second(attempts[0])
            outcomes = [attempt.outcome for attempt in attempts]
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            attempt = next(attempt for attempt in attempts if attempt.outcome.done())
            if self._answers(attempt):
                return attempt
            attempts.remove(attempt)

    async def _ask_next(self) -> None:
        if self._run.cancelled:
            raise _final(self._error) if self._error else stopped()
        changes = self._boxes.candidates.changes.count
        box = await self._boxes.choose(self._job, self._tried)
        if isinstance(box, ChosenBox):
            self._ask(box)
        elif not await self._wait(changes):
            raise _final(self._error) if self._error else box

    async def _answers_in_time(self, attempt: LegAttempt) -> bool:
        hedge = self._boxes.candidates.hedge_seconds
        if not hedge or self._run.cancelled:
            return True
        await asyncio.wait([attempt.outcome], timeout=hedge)
        return attempt.outcome.done()

    async def _ask_second(self, first: LegAttempt) -> None:
        box = await self._boxes.choose(self._job, self._tried)
        if isinstance(box, ChosenBox):
            if first.outcome.done():
                box.release(None)
            else:
                self._ask(box)

    def _ask(self, box: ChosenBox) -> None:
        self._tried[box.node_id] = time.monotonic()
        self._run.attempt(box).begin()

    def _answers(self, attempt: LegAttempt) -> bool:
        """Raises what is the request's own fault: of a peer, a second one has to say so too."""
        error = attempt.outcome.result()
        if error is None:
            return True
        if not isinstance(error, ApiError if attempt.box.is_peer else NoNodesAvailable):
            raise error
        self._faults += not isinstance(error, NoNodesAvailable)
        if self._faults > 1:
            raise error
        log.debug("%s did not serve a leg: %s", attempt.box.node_id, error.message)
        if not _is_own(self._error):
            self._error = error
        return False

    async def _wait(self, changes: int) -> bool:
        """Until another box may serve, or one that was tried may be asked again.

        A request waits for another one of ours that takes its place at a peer, and an answer that
        has begun for any box, for some time.  False: there is nothing to wait for.
        """
        candidates, now = self._boxes.candidates, time.monotonic()
        if self._forget_tried(candidates.has_served_since):
            return True
        if candidates.at_capacity_with_our_requests(self._job):
            until = math.inf
        elif self._job.leg and now < self._deadline:
            until = self._deadline
        else:
            return False
        if not self._forget_tried(self._may_retry):
            retries = [moment + _RETRY_SECONDS for moment in self._tried.values()]
            until = min(until, candidates.next_expiry(), *retries)
            await candidates.changes.wait(changes, None if until == math.inf else until - now)
            self._forget_tried(self._may_retry)
        return True

    def _may_retry(self, node_id: str, tried: float) -> bool:
        candidates = self._boxes.candidates
        return (
            time.monotonic() >= tried + _RETRY_SECONDS
            or candidates.has_served_since(node_id, tried)
            or candidates.is_no_longer_busy(node_id, tried)
        )

    def _forget_tried(self, may_retry: Callable[[str, float], bool]) -> bool:
        """Those that may be asked again; whether there are any."""
        over = [node_id for node_id, moment in self._tried.items() if may_retry(node_id, moment)]
        for node_id in over:
            del self._tried[node_id]
        return bool(over)


def _is_own(error: ApiError | None) -> bool:
    """Whether it is the loss of an engine here, which another leg starts anew."""
    return isinstance(error, EngineLost) and not error.node_id


def _final(error: ApiError) -> ApiError:
    """All have been asked: the loss of a peer is no reason for another leg any more."""
    if _is_own(error) or not isinstance(error, EngineLost):
        return error
    reason = error.message.rstrip(".")
    return NoNodesAvailable(
        f"{reason}, and nobody else can serve it now.  Try again later.", retry_after=2
    )
