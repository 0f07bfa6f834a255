"""The backend that chooses: this box or a peer, another if that one fails before it has begun.

What fails in mid-stream is EngineLost, as with an engine: `requests` then asks for another leg.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from random import Random

from pinaivu_box.config import RoutingPolicy
from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import ApiError, EngineLost, ModelNotFound, NoNodesAvailable, PeerFaulty
from pinaivu_box.gateway.backend import Event, Job, Output, Proved, Started
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.metering import LegRecord
from pinaivu_box.legs.client import PeerBackend
from pinaivu_box.models.catalog import Model
from pinaivu_box.routing.candidates import Candidates, tokens_of
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Decision, RoutingRequest, Weights, route, unsure

log = logging.getLogger("pinaivu.dispatch")

_PINNED = 4096  # requests whose file is remembered
_PATIENCE = 15.0  # seconds that a begun answer waits for somebody who goes on with it
_PAUSE = 0.25


@dataclass(frozen=True)
class RoutingSettings:
    """The settings; see `router`.  After `hedge` seconds without a first token a second box is
    asked as well, and the first to speak serves; 0: never."""

    policy: RoutingPolicy = "prefer-local"
    same_name: bool = False
    weights: Weights = field(default_factory=Weights)
    hedge: float = 0.0


@dataclass
class _LegAttempt:
    """One attempt at a leg: `head` is what it says up to its first output.  It must be closed, even
    if it has failed; `place` is what it takes until then."""

    node_id: str
    events: AsyncGenerator[Event]
    head: asyncio.Task[list[Event]]
    place: contextlib.ExitStack

    async def aclose(self) -> None:
        with self.place:
            self.head.cancel()
            await asyncio.wait([self.head])
            await self.events.aclose()


class LegRunner:
    """`digest` is of the file that a local model runs (see `Placement.digest_of`)."""

    def __init__(
        self,
        candidates: Candidates,
        local: LocalBackend,
        peers: PeerBackend,
        load: LoadTracker,
        resting: CircuitBreaker,
        reputation: Reputation,
        digest: Callable[[Model], Awaitable[str]],
        currency: Callable[[], str],
        routing: RoutingSettings,
    ) -> None:
        self.candidates = candidates
        self.routing = routing
        self._local, self._peers, self._load = local, peers, load
        self._resting, self._reputation = resting, reputation
        self._digest, self._currency = digest, currency
        self._random = Random()  # noqa: S311, it only spreads requests
        self._pinned: OrderedDict[str, str] = OrderedDict()
        self._paid: OrderedDict[str, None] = OrderedDict()
        self._cancelled: set[str] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def serve(self, job: Job, made: list[int]) -> AsyncGenerator[Event]:
        """As `Backend.serve`; Started, Prompt and the first Output come together."""
        try:
            attempt = await self._begin(job, made)
            async with contextlib.aclosing(attempt):
                for event in attempt.head.result():
                    yield event
                if _last(event):
                    return
                async for event in attempt.events:
                    yield event
                    if _last(event):
                        return
        finally:
            self._cancelled.discard(job.id)

    def cancel(self, job: Job) -> None:
        self._cancelled.add(job.id)
        self._local.cancel(job)
        self._peers.cancel(job)

    # -- before the first token --------------------------------------------------------------------

    async def _begin(self, job: Job, made: list[int]) -> _LegAttempt:
        """An attempt that has spoken.  Raises NoNodesAvailable, or what a box refused with."""
        tried, patience = list(job.tried), time.monotonic() + _PATIENCE
        trying: list[_LegAttempt] = []
        error: ApiError | None = None
        blamed = 0  # how many say that the request itself is at fault
        try:
            while True:
                if not trying:
                    decision, digest = await self._route(job, made, tried)
                    if decision.node_id is None:
                        if not await self._wait(job, tried, patience):
                            raise _given_up(error) if error else self._nobody(job, decision)
                        continue
                    tried.append(decision.node_id)
                    trying.append(self._try(job, made, decision, digest))
                if len(trying) == 1 and not await self._spoke(trying[0], job):
                    decision, digest = await self._route(job, made, tried)
                    if decision.node_id is not None:
                        tried.append(decision.node_id)
                        trying.append(self._try(job, made, decision, digest))
                heads = [one.head for one in trying]
                await asyncio.wait(heads, return_when=asyncio.FIRST_COMPLETED)
                done = next(one for one in trying if one.head.done())
                failed = self._failure(done)
                blamed += not isinstance(failed, NoNodesAvailable | None)
                if failed is None or blamed > 1:
                    done.head.result()  # raises what is the request's own fault
                    trying.remove(done)
                    return done
                error = error if _own(error) else failed
                trying.remove(done)
                await done.aclose()
                if error is not None and job.id in self._cancelled and not trying:
                    raise _given_up(error)
        finally:
            for one in trying:
                await self._leave(one, job)

    async def _leave(self, attempt: _LegAttempt, job: Job) -> None:
        """Another was quicker.  What a peer has computed until it hears that is owed to it: it is
        told to stop, and its proof is accepted, while the request goes on."""
        if not self._peers.cancel(job, attempt.node_id):
            await attempt.aclose()
            return
        task = asyncio.create_task(_hear_out(attempt))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _spoke(self, attempt: _LegAttempt, job: Job) -> bool:
        """Whether it did before it is time to hedge."""
        hedge = self.routing.hedge
        if not hedge or job.id in self._cancelled:
            await asyncio.wait([attempt.head])
            return True
        done, _ = await asyncio.wait([attempt.head], timeout=hedge)
        return bool(done)

    def _failure(self, attempt: _LegAttempt) -> ApiError | None:
        """Why somebody else may be asked, None if it went well or is the request's own fault: but
        of a peer, a second one has to say that too."""
        error = attempt.head.exception()
        here = attempt.node_id == self.candidates.me
        if not isinstance(error, NoNodesAvailable if here else ApiError):
            return None
        if not here and isinstance(error, NoNodesAvailable) and not isinstance(error, EngineLost):
            self.candidates.refused(attempt.node_id, error.retry_after or 1, error.message)
        log.debug("%s did not serve a leg: %s", attempt.node_id, error.message)
        return error

    async def _wait(self, job: Job, tried: list[str], patience: float) -> bool:
        """For the end of another request of ours, where they take a peer's places; and an answer
        that has begun waits for somebody to come back.  False: nobody will."""
        if job.id in self._cancelled:
            return False
        if not self.candidates.full_of_ours(job) and (not job.leg or time.monotonic() > patience):
            return False
        tried.clear()
        await asyncio.sleep(_PAUSE)
        return True

    def _nobody(self, job: Job, decision: Decision) -> NoNodesAvailable:
        return NoNodesAvailable(
            f"Nobody can serve {job.model.id} now: {decision.why_nobody()}.  Try again later.",
            retry_after=2,
        )

    async def _route(self, job: Job, made: list[int], tried: list[str]) -> tuple[Decision, str]:
        """Where it goes, and the digest of the file there."""
        here = "" if job.model.remote else await self._digest(job.model)
        routing, pinned = self.routing, job.digest or self._pinned.get(job.request_id)
        await self.candidates.ceilings.look()
        found = self.candidates.of(job, here, len(made))
        prompt, most = tokens_of(job, len(made))
        ask = RoutingRequest(
            model=job.model.id,
            digest=pinned or here or job.model.recorded_digest,
            tokens=prompt + most,
            currency=self._currency(),
            policy=job.routing or routing.policy,
            same_name=routing.same_name and pinned is None,
            local_only=job.local_only,
            tried=tried,
        )
        decision = route(found, ask, self._random, routing.weights)
        if unsure(decision, found, ask):
            await self._peers.look(job.model.id)
            found = self.candidates.of(job, here, len(made))
            decision = route(found, ask, self._random, routing.weights)
        if decision.node_id is None:  # rather who failed lately than nobody, if its link stands
            woken = [one if one.gone else replace(one, resting=None) for one in found]
            decision = route(woken, ask, self._random, routing.weights)
        digest = ""
        if decision.node_id is not None:
            # A node may offer several files under that name: the one that was asked for first.
            digests = [one.digest for one in found if one.node_id == decision.node_id]
            digest = ask.digest if ask.digest in digests else digests[0]
            self._pin(job.request_id, digest)
        return decision, digest

    def _pin(self, request_id: str, digest: str) -> None:
        """All choices and legs of a request are of one file."""
        self._pinned.setdefault(request_id, digest)
        if len(self._pinned) > _PINNED:
            self._pinned.popitem(last=False)

    # -- one leg -----------------------------------------------------------------------------------

    def _try(self, job: Job, made: list[int], decision: Decision, digest: str) -> _LegAttempt:
        node_id = decision.node_id or ""
        here = node_id == self.candidates.me
        # At once, so that of several requests that come together each sees where the others went.
        place = contextlib.ExitStack()
        if here:
            place.enter_context(self._load.taken(job.model.id))
        self.candidates.sent(job, node_id)
        place.callback(self.candidates.ended, job, node_id)
        leg = self._here(job, made) if here else self._there(job, made, node_id, digest)
        events = self._told(job, leg, decision)
        return _LegAttempt(node_id, events, asyncio.create_task(_head(events)), place)

    async def _told(
        self, job: Job, leg: AsyncGenerator[Event], decision: Decision
    ) -> AsyncGenerator[Event]:
        async with contextlib.aclosing(leg) as events:
            async for event in events:
                if isinstance(event, Started):
                    yield replace(event, route=decision.record(), header=decision.header())
                    if job.id in self._cancelled:  # while it was beginning
                        self.cancel(job)
                else:
                    yield event

    def _here(self, job: Job, made: list[int]) -> AsyncGenerator[Event]:
        events = self._local.serve(job, made)
        return _watched(events, lambda leg: self._load.measured(job.model.id, leg))

    async def _there(
        self, job: Job, made: list[int], node_id: str, digest: str
    ) -> AsyncGenerator[Event]:
        try:
            to = self.candidates.destination(job, node_id, digest)
        except ModelNotFound as error:
            raise EngineLost(error.message, node_id=node_id) from error
        prompt, proven = f"{job.request_id} {job.prompt_number} {node_id}", False
        to = replace(to, pays_prompt=self._first(prompt))
        sent = self._resting.sent(node_id)
        leg = _watched(
            self._peers.serve(job, made, to), lambda leg: self._went_well(job, node_id, leg)
        )
        try:
            async with contextlib.aclosing(leg) as events:
                async for event in events:
                    proven |= isinstance(event, Proved)
                    yield event
        except EngineLost as error:
            self._went_wrong(node_id, error, sent)
            raise
        finally:
            if to.pays_prompt and not proven:
                self._paid.pop(prompt, None)  # then the next one does

    def _first(self, name: str) -> bool:
        """Whether it is the first of its prompt there: that one pays for it."""
        first = name not in self._paid
        self._paid[name] = None
        if len(self._paid) > _PINNED:
            self._paid.popitem(last=False)
        return first

    def _went_well(self, job: Job, node_id: str, leg: LegRecord) -> None:
        self._resting.served(node_id)
        self.candidates.refusals.pop(node_id, None)
        self.candidates.freed(node_id)
        if leg.finish_reason != "cancelled":
            promised = self.candidates.promised(job, node_id)
            self._reputation.served(node_id, promised, leg.tokens_per_s)

    def _went_wrong(self, node_id: str, error: EngineLost, sent: float) -> None:
        rests = self._resting.failed(node_id, sent)
        log.warning("%s rests for %.1f s: %s", node_id, rests, error.message)
        if isinstance(error, PeerFaulty):
            self._reputation.disputed(node_id, error.message)
        else:
            self._reputation.failed(node_id, error.message)

    # -- prompts that are only read ----------------------------------------------------------------

    async def read(self, job: Job) -> tuple[Job, int]:
        """The job with its prompt's tokens, and the context of its model."""
        if not job.model.remote:
            return await self._local.read(job)
        found, context = await self._count(job, None, plain=False)
        return replace(job, read=found.tokens, thinking=found.thinking), context

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> Tokenized:
        if not job.model.remote:
            return await self._local.tokenize(job, tokens, plain=plain, count=count)
        return (await self._count(job, tokens, plain=plain))[0]

    async def _count(
        self, job: Job, tokens: list[int] | None, *, plain: bool
    ) -> tuple[Tokenized, int]:
        tried: list[str] = []
        error: ApiError | None = None
        while True:
            decision, digest = await self._route(job, [], tried)
            if decision.node_id is None:
                raise error or self._nobody(job, decision)
            tried.append(decision.node_id)
            try:
                to = self.candidates.destination(job, decision.node_id, digest)
                found = await self._peers.count(job, to, tokens, plain=plain)
                return Tokenized(job.id, found.tokens, found.text, found.thinking), found.context
            except ApiError as failed:
                if isinstance(failed, NoNodesAvailable) and not isinstance(failed, EngineLost):
                    seconds = failed.retry_after or 1
                    self.candidates.refused(decision.node_id, seconds, failed.message)
                elif error is not None and not isinstance(failed, NoNodesAvailable):
                    raise
                error = failed


def _own(error: ApiError | None) -> bool:
    """Whether it is of an engine here, which another leg starts anew."""
    return isinstance(error, EngineLost) and not error.node_id


def _given_up(error: ApiError) -> ApiError:
    """All have been asked: the loss of a peer is no reason for another leg any more."""
    if _own(error) or not isinstance(error, EngineLost):
        return error
    told = f"{error.message.rstrip('.')}, and nobody else can serve it now.  Try again later."
    return NoNodesAvailable(told, retry_after=2)


async def _watched(
    leg: AsyncGenerator[Event], ended: Callable[[LegRecord], None]
) -> AsyncGenerator[Event]:
    """The same events; `ended` hears of the whole leg before the last."""
    seen = None
    async with contextlib.aclosing(leg) as events:
        async for event in events:
            if isinstance(event, Started):
                seen = LegRecord(event)
            elif isinstance(event, Output) and seen is not None:
                seen.take(event)
                if event.finish_reason:
                    ended(seen)
            yield event


async def _head(events: AsyncGenerator[Event]) -> list[Event]:
    """What comes up to the first output."""
    head = []
    async for event in events:
        head.append(event)
        if isinstance(event, Output):
            return head
    raise EngineLost("The engine ended this request without a word; try again.")


async def _hear_out(attempt: _LegAttempt) -> None:
    """To its end."""
    with contextlib.suppress(ApiError):
        async with contextlib.aclosing(attempt):
            await attempt.head
            async for _ in attempt.events:
                pass


def _last(event: Event) -> bool:
    return isinstance(event, Output) and event.finish_reason is not None
