"""Legs of other boxes' requests, served here: as a tenant with limits of its own, never sent on.

See `wire` for the messages, and `admission` for what a peer may have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from msgspec import UNSET

from pinaivu_box import amount
from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import (
    ApiError,
    Conflict,
    InternalError,
    InvalidBody,
    ModelNotAllowed,
    ModelNotFound,
    NoNodesAvailable,
    PeeringError,
    ProtocolError,
    RateLimited,
)
from pinaivu_box.gateway.backend import Backend, Job
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.request_spans import RequestSpans
from pinaivu_box.gateway.scopes import peer_scope
from pinaivu_box.identity import Identity, verify
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.admission import LegAdmission, LegPermit, PeerRequest
from pinaivu_box.legs.codec import to_job
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.legs.served_leg import ALIVE_SECONDS, ServedLeg, another_file
from pinaivu_box.legs.served_upstreams import ServedUpstreams
from pinaivu_box.legs.upstream_breaker import UpstreamOutcome
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.prices import prices_of
from pinaivu_box.policy import PeerPolicy
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    UPSTREAM_VERSION,
    LegStatement,
    Price,
    SignedProof,
)
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import ignore_exception
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.transport import rpc, wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.upstream.upstream import OWNER

log = logging.getLogger("pinaivu.serving")

_ASK_SECONDS = 30.0  # for a task to come whole
_TYPICAL_TOKENS = 256  # of an answer without a limit, until it is known better
# Refusals that are of this box or of the peer here: somebody else may well serve the request.
_OTHERS = (NoNodesAvailable, RateLimited, ModelNotAllowed, ModelNotFound, Conflict, InternalError)


class LegServer:
    """`digest` (see `Placement.digest_of`) raises NoNodesAvailable, and `writable` too if nothing
    could be kept now."""

    def __init__(
        self,
        identity: Identity,
        local: LocalBackend,
        load: LoadTracker,
        settings: LiveSettings,
        admission: LegAdmission,
        digest: Callable[[Model], Awaitable[str]],
        writable: Callable[[], Awaitable[None]],
        large: LargeMessages,
        upstreams: ServedUpstreams,
        begin_span: Callable[[str], TraceContext | None],
        spans: RequestSpans,
    ) -> None:
        self._large, self._upstreams = large, upstreams
        self._begin_span, self._spans = begin_span, spans
        self._identity, self._local, self._load = identity, local, load
        self._settings = settings
        self._digest, self._writable = digest, writable
        self.admission = admission
        self._legs = 0
        self.draining = False

    async def drained(self) -> None:
        """Wait until no leg is left."""
        await self.admission.idle.wait()

    async def handle(self, peer: str, stream: Stream) -> None:
        """One stream of the purpose `work`.  Raises PeeringError if the peer broke off, or the
        rules."""
        async with asyncio.timeout(_ASK_SECONDS), self.admission.receiving(peer):
            check = self._large.to_serving(peer)
            message = await leg_wire.receive(stream, leg_wire.to_serving, check=check)
        try:
            if isinstance(message, leg_wire.Count):
                await leg_wire.send(stream, await self._count(peer, stream, message))
            elif isinstance(message, leg_wire.LegRequest):
                await self._serve(peer, stream, message)
            else:
                raise ProtocolError("unexpected message")
        except ApiError as error:
            await leg_wire.send(stream, _refused(error))
        except PeeringError:
            raise
        except Exception:
            log.exception("a request of %s failed", peer)
            await leg_wire.send(
                stream, _refused(InternalError("The box failed; its log says why."))
            )
        async with asyncio.timeout(rpc.SEND_SECONDS):
            await stream.finish()

    async def _count(self, peer: str, stream: Stream, count: leg_wire.Count) -> leg_wire.Tokens:
        policy = await self.admission.policy(peer)
        job = await self._job(peer, count.task, count.digest, policy)
        currency = self._settings.config.pricing.currency
        async with self.admission.request(peer, policy, currency) as request:
            await request.check()
            request.check_counting()
            if job.model.owner == OWNER:
                raise NoNodesAvailable("Nobody here knows the tokens of an upstream's model.")
            reading = self._local.tokenize(job, count.tokens, plain=count.plain)
            prompt, context = await self._saying_alive(
                stream if count.patient is True else None, reading
            )
            request.counted.enter(max(len(prompt.tokens), len(count.tokens or ())))
        return leg_wire.Tokens(prompt.tokens, prompt.text, prompt.thinking, context)

    async def _job(self, peer: str, task: leg_wire.Task, digest: str, policy: PeerPolicy) -> Job:
        if self.draining:
            raise NoNodesAvailable("This box is shutting down: send it elsewhere.", retry_after=5)
        if policy.refusal is not None:
            raise ModelNotAllowed(policy.refusal)
        await self._writable()
        if not policy.serves(task.model):
            raise ModelNotAllowed(f"This box does not serve {task.model} to yours.", param="model")
        model = self._upstreams.model(task.model, digest)
        if model is None:
            model = self._settings.catalog.find(task.model)
            if await self._digest(model) != digest:
                raise another_file(model)
        # Whatever the peer calls it: a name of our own keeps its requests apart from others.
        self._legs += 1
        job = to_job(task, model, peer, peer_scope(peer, task.tag, task.request_id))
        return replace(job, name=f"peer.{self._legs}")

    async def _serve(self, peer: str, stream: Stream, leg_request: leg_wire.LegRequest) -> None:
        admission, policy = self.admission, await self.admission.policy(peer)
        job = await self._job(peer, leg_request.task, leg_request.digest, policy)
        told = leg_request.traceparent
        trace = self._begin_span(told) if told is not UNSET else None
        job = replace(job, output=leg_request.made, trace=trace)
        price = self._price(job.model, leg_request)
        of_upstream = job.model.owner == OWNER
        if of_upstream and (leg_request.proof < UPSTREAM_VERSION or job.leg or job.output):
            raise Conflict(
                "An upstream's answers are not continued, nor sent without their version."
            )
        async with admission.request(peer, policy, price.currency) as request:
            prompt_tokens = context = 0
            if policy.limited:
                await request.check()
            if of_upstream:
                estimate, context = self._upstreams.estimate(job)
                prompt_tokens = estimate.count or 0
            elif policy.limited:
                reading = self._local.tokenize(job)
                prompt, context = await self._saying_alive(stream, reading)
                job = job.with_prompt(prompt)
                prompt_tokens = len(job.prompt_tokens or ())
            prompt_tokens, answer = self._most_tokens(job, prompt_tokens, context)
            await request.reserve(
                tokens=prompt_tokens + len(job.output) + answer,
                cost=price.prices.most(prompt_tokens, answer),
            )
            with self._load.taken(job.model.id):
                async with admission.leg(peer, job, pays=leg_request.pays_prompt) as permit:
                    await self._run(stream, job, price, leg_request, permit, request)

    async def _saying_alive(
        self, stream: Stream | None, tokenizing: Coroutine[Any, Any, tuple[Tokenized, int]]
    ) -> tuple[Tokenized, int]:
        """The tokens of a prompt, and the context of its model.  That takes long if it is a long
        one, or the model has to be loaded; who has left meanwhile does not stop what others may
        wait for too."""
        reading = asyncio.create_task(tokenizing)
        reading.add_done_callback(ignore_exception)
        try:
            while not (await asyncio.wait({reading}, timeout=ALIVE_SECONDS))[0]:
                if stream is not None:
                    await leg_wire.send(stream, leg_wire.Alive())
        except PeeringError:
            await asyncio.wait({reading})  # it keeps its place until then
            raise
        return reading.result()

    async def _run(
        self,
        stream: Stream,
        job: Job,
        price: Price,
        leg_request: leg_wire.LegRequest,
        permit: LegPermit,
        request: PeerRequest,
    ) -> None:
        backend: Backend = self._local
        outcome: UpstreamOutcome | None = None
        if job.model.owner == OWNER:
            backend = upstream = self._upstreams.choose(job.model.id)
            outcome = UpstreamOutcome(self._upstreams.breaker, upstream)
        leg = ServedLeg(stream, leg_request, job, backend, self._identity, price)
        owed, failed = False, ""
        try:
            async with leg:
                await asyncio.sleep(0)  # the engine has its request before anything else is done
                await permit.check_new()
                owed = True
                if await leg.send_all(permit.check_paid):
                    permit.proven = True
                    await leg.hear_verdict()
        except ApiError as error:
            owed, failed = False, error.code  # the peer is refused, and gets no more
            if outcome is not None:
                outcome.failed(error)
            raise
        finally:
            # Whatever the peer has done meanwhile, and wherever it hung up.  What other legs have
            # made is computed here too, like a prompt, though nobody pays for it again.
            used = leg.tokens + len(job.output) if owed and leg.tokens else 0
            request.reservation.tokens.correct(used)
            proven = leg.proof() if owed else None
            if leg.record is not None and proven is not None:
                if outcome is not None:
                    outcome.served(leg.record)
                else:
                    self._load.measured(job.model.id, leg.record)
            if leg.record is not None:
                self._spans.served_for_peer(leg.record, failed)
            if proven is not None and self._is_owed(proven[0]):
                await self._settle(permit, leg, *proven, leg_request.pays_prompt)

    def _is_owed(self, proof: LegStatement) -> bool:
        """A box that stops ends its peers' requests itself, and nobody owes for that."""
        return not (self.draining and proof.finish_reason == "cancelled")

    def _most_tokens(self, job: Job, prompt: int, context: int) -> tuple[int, int]:
        """Of the prompt and of the answer, at most; guessed without a `context`, that is, if the
        `prompt` was not read."""
        prompt = prompt or (0 if context else _TYPICAL_TOKENS)
        if job.inputs is not None:
            return prompt, 0
        limit = None if job.max_tokens is None else max(0, job.max_tokens - len(job.output))
        if not context:
            return prompt, _TYPICAL_TOKENS if limit is None else limit
        room = leg_wire.MAX_TOKENS if self._settings.config.engine.context_shift else context
        room = max(0, room - prompt - len(job.output))
        return prompt, room if limit is None else min(limit, room)

    def _price(self, model: Model, leg_request: leg_wire.LegRequest) -> Price:
        """What we ask now, unless that is more than the peer was told."""
        pricing = self._settings.config.pricing
        price = Price.of(prices_of(model, pricing), pricing.currency)
        ours = (price.prompt, price.cached, price.completion)
        try:
            offered = [amount.per_token(price) for price in leg_request.prices]
        except ValueError as error:
            raise InvalidBody(f"a price is {error}") from None
        if price.currency != leg_request.currency or any(
            amount.per_token(own) > offer for own, offer in zip(ours, offered, strict=True)
        ):
            listed = " / ".join(ours)
            raise Conflict(f"The price of {model.id} here is {listed} {price.currency} now.")
        return price

    async def _settle(
        self,
        permit: LegPermit,
        leg: ServedLeg,
        proof: LegStatement,
        signed: SignedProof,
        pays_prompt: bool,
    ) -> None:
        """Into the ledger, also if the peer has not accepted it: then it waits for that there, and
        counts against the peer's credit."""
        peer, acceptance, disputed, forged, verdict = permit.peer, b"", None, False, leg.verdict
        if isinstance(verdict, leg_wire.Accepted):
            acceptance = bytes.fromhex(verdict.signature)
            if not verify(peer, ACCEPTANCE_DOMAIN, signed.signed.encode(), acceptance):
                acceptance, forged = b"", True
        elif verdict is not None:
            disputed = wire.printable(verdict.why)
            log.warning("%s disputes a leg of %s: %s", peer, proof.request_id, disputed)
        else:
            log.info("%s has not accepted a leg of %s", peer, proof.request_id)
        await permit.ledger.keep(
            ledger_entry.of_leg(peer, proof, signed, pays_prompt, acceptance, disputed)
        )
        permit.served()
        if forged:
            raise ProtocolError("it accepted a proof with a signature that is not its own")


def _refused(error: ApiError) -> leg_wire.LegRefused:
    other = isinstance(error, _OTHERS)
    return leg_wire.LegRefused(error.code, error.message, error.param, error.retry_after, other)
