"""Requests of other boxes, served here: as a tenant with limits of its own, never sent on.

See `peering.work` for what is said, and `guests` for what a peer may use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.errors import (
    ApiError,
    Conflict,
    EngineLost,
    InternalError,
    InvalidBody,
    ModelNotAllowed,
    ModelNotFound,
    NoNodesAvailable,
    PeeringError,
    ProtocolError,
    RateLimited,
)
from pinaivu_box.gateway import logprob_records
from pinaivu_box.gateway.backend import Event, Job, Output, Prompt, Started
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.metering import ENGINE_LOST, LegRecord, prove
from pinaivu_box.gateway.quota import Reservation
from pinaivu_box.gateway.scopes import peer_scope
from pinaivu_box.identity import Identity, verify
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.admission import LegAdmission, LegPermit
from pinaivu_box.legs.codec import to_job
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.models.catalog import Model
from pinaivu_box.policy import PeerPolicy
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    MARK_DOMAIN,
    VERSION,
    Price,
    Proof,
    SignedProof,
    cost,
    mark_text,
    sign_proof,
)
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

log = logging.getLogger("pinaivu.serving")

_ASK_SECONDS = 30.0  # for a task to come whole
_ALIVE_SECONDS = 1.0
_ACCEPT_SECONDS = 10.0
_TYPICAL_TOKENS = 256  # of an answer without a limit, until it is known better
_SHORT = 4096  # bytes
_STOPS = 8  # that one leg is worth
_VECTOR_BYTES = leg_wire.MAX_MESSAGE_BYTES // 2  # of vectors in one message
# Refusals that are of this box or of the peer here: somebody else may well serve the request.
_OTHERS = (NoNodesAvailable, RateLimited, ModelNotAllowed, ModelNotFound, Conflict, InternalError)


@dataclass(frozen=True)
class Served:
    """A leg that was served for a peer; `acceptance` is b"" if it has not been accepted, and
    `disputed` why, if the peer said so."""

    peer: str
    proof: Proof
    signed: SignedProof
    amount: int
    acceptance: bytes
    disputed: str | None = None


class LegServer:
    """`record` keeps each leg; `find` raises ModelNotFound, `digest` (see `Placement.digest_of`)
    NoNodesAvailable, and `writable` too if nothing could be kept now."""

    def __init__(
        self,
        identity: Identity,
        local: LocalBackend,
        load: LoadTracker,
        find: Callable[[str], Model],
        prices: Callable[[Model], Prices],
        currency: Callable[[], str],
        admission: LegAdmission,
        record: Callable[[Served], Awaitable[None]],
        digest: Callable[[Model], Awaitable[str]],
        writable: Callable[[], Awaitable[None]],
        large: LargeMessages,
    ) -> None:
        self._large = large
        self._identity, self._local, self._load = identity, local, load
        self._find, self._prices, self._currency = find, prices, currency
        self._record, self._digest, self._writable = record, digest, writable
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
            asked = await leg_wire.receive(stream, leg_wire.to_serving, check=check)
        try:
            if isinstance(asked, leg_wire.Count):
                await leg_wire.send(stream, await self._count(peer, asked))
            elif isinstance(asked, leg_wire.LegRequest):
                await self._serve(peer, stream, asked)
            else:
                raise ProtocolError("a request begins with Ask or Count")
        except ApiError as error:
            await leg_wire.send(stream, _refused(error))
        except PeeringError:
            raise
        except Exception:
            log.exception("a request of %s failed", peer)
            await leg_wire.send(
                stream, _refused(InternalError("The box failed; its log says why."))
            )
        async with asyncio.timeout(leg_wire.SEND_SECONDS):
            await stream.finish()

    async def _count(self, peer: str, asked: leg_wire.Count) -> leg_wire.Tokens:
        policy = await self.admission.accounts.policy(peer)
        job = await self._job(peer, asked.task, asked.digest, policy)
        async with self.admission.place(peer, policy):
            await self.admission.check(peer, policy, self._currency())
            self.admission.check_counting(peer, policy)
            found, context = await self._local.ask(job, asked.tokens, plain=asked.plain)
            self.admission.counted(peer, max(len(found.tokens), len(asked.tokens or ())))
        return leg_wire.Tokens(found.tokens, found.text, found.thinking, context)

    async def _job(self, peer: str, task: leg_wire.Task, digest: str, policy: PeerPolicy) -> Job:
        if self.draining:
            raise NoNodesAvailable("This box is shutting down: send it elsewhere.", retry_after=5)
        if policy.refusal is not None:
            raise ModelNotAllowed(policy.refusal)
        await self._writable()
        if not policy.serves(task.model):
            raise ModelNotAllowed(f"This box does not serve {task.model} to yours.", param="model")
        model = self._find(task.model)
        if await self._digest(model) != digest:
            raise _another_file(model)
        # Whatever the peer calls it: a name of our own keeps its requests apart from others.
        self._legs += 1
        job = to_job(task, model, peer, peer_scope(peer, task.tag, task.request_id))
        return replace(job, name=f"peer.{self._legs}")

    async def _serve(self, peer: str, stream: Stream, asked: leg_wire.LegRequest) -> None:
        admission, policy = self.admission, await self.admission.accounts.policy(peer)
        job = await self._job(peer, asked.task, asked.digest, policy)
        price = self._price(job.model, asked)
        async with admission.place(peer, policy) as reservation:
            context = 0
            if policy.limited:
                await admission.check(peer, policy, price.currency)
                job, context = await self._read(stream, job)
            prompt, answer = self._most_tokens(job, asked.made, context)
            await admission.reserve(
                reservation,
                peer,
                policy,
                price.currency,
                tokens=prompt + len(asked.made) + answer,
                cost=price.prices.most(prompt, answer),
            )
            with self._load.taken(job.model.id):
                async with admission.leg(peer, job, pays=asked.pays_prompt) as permit:
                    await self._run(peer, stream, job, price, asked, permit, reservation)

    async def _read(self, stream: Stream, job: Job) -> tuple[Job, int]:
        """With its prompt's tokens, and the context of its model.  That takes long if the model has
        to be loaded; who has left meanwhile does not stop what others may wait for too."""
        reading = asyncio.create_task(self._local.read(job))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not (await asyncio.wait({reading}, timeout=_ALIVE_SECONDS))[0]:
                await leg_wire.send(stream, leg_wire.Alive())
        except PeeringError:
            await asyncio.wait({reading})  # it keeps its place until then
            raise
        return reading.result()

    async def _run(
        self,
        peer: str,
        stream: Stream,
        job: Job,
        price: Price,
        asked: leg_wire.LegRequest,
        permit: LegPermit,
        reservation: Reservation,
    ) -> None:
        leg = _ServedLeg(self._identity, self._local, stream, job, price, asked)
        owed = False
        try:
            async with leg:
                await asyncio.sleep(0)  # the engine has its request before anything else is done
                await permit.check_new(self.admission.accounts)
                owed = True
                if await leg.send_all(permit.check_paid):
                    permit.proven = True
                    await leg.hear_out()
        except ApiError:
            owed = False  # the peer is refused, and gets no more
            raise
        finally:
            # Whatever the peer has done meanwhile, and wherever it hung up.
            proof = leg.proof() if owed else None
            # A box that stops ends its peers' requests itself, and nobody owes for that.
            if self.draining and proof is not None and proof.finish_reason == "cancelled":
                proof = None
            # What other legs have made is computed here too, like a prompt, though nobody pays
            # for it again.
            reservation.use(leg.tokens + len(asked.made) if owed and leg.tokens else 0)
            if proof is not None:
                self._load.measured(job.model.id, leg.account)
                await self._settle(peer, proof, asked.pays_prompt, leg.said)
                permit.served()

    def _most_tokens(self, job: Job, made: list[int], context: int) -> tuple[int, int]:
        """Of the prompt and of the answer, at most; guessed without a `context`, that is, if the
        prompt was not read."""
        prompt = len(job.read or ()) or (0 if context else _TYPICAL_TOKENS)
        if job.inputs is not None:
            return prompt, 0
        asked = None if job.max_tokens is None else max(0, job.max_tokens - len(made))
        if not context:
            return prompt, _TYPICAL_TOKENS if asked is None else asked
        room = leg_wire.MOST_TOKENS if self._load.config.context_shift else context
        most = max(0, room - prompt - len(made))
        return prompt, most if asked is None else min(asked, most)

    def _price(self, model: Model, asked: leg_wire.LegRequest) -> Price:
        """What we ask now, unless that is more than the peer was told."""
        prices, currency = self._prices(model), self._currency()
        cached = prices.prompt if prices.cached is None else prices.cached
        ours = (prices.prompt, cached, prices.completion)
        try:
            told = [amount.per_token(price) for price in asked.prices]
        except ValueError as error:
            raise InvalidBody(f"a price is {error}") from None
        if currency != asked.currency or any(
            amount.per_token(own) > most for own, most in zip(ours, told, strict=True)
        ):
            raise Conflict(f"The price of {model.id} here is {' / '.join(ours)} {currency} now.")
        return Price(currency, *ours)

    async def _settle(
        self,
        peer: str,
        proof: Proof,
        pays_prompt: bool,
        said: leg_wire.Accepted | leg_wire.Disputed | None,
    ) -> None:
        """Into the ledger, also if the peer has not accepted it: then it waits for that there, and
        counts against the peer's credit."""
        signed = sign_proof(self._identity, proof)
        acceptance, disputed, forged = b"", None, False
        if isinstance(said, leg_wire.Accepted):
            acceptance = bytes.fromhex(said.signature)
            if not verify(peer, ACCEPTANCE_DOMAIN, signed.signed.encode(), acceptance):
                acceptance, forged = b"", True
        elif said is not None:
            disputed = wire.printable(said.why)
            log.warning("%s disputes a leg of %s: %s", peer, proof.request_id, disputed)
        else:
            log.info("%s has not accepted a leg of %s", peer, proof.request_id)
        due = cost(proof, pays_prompt)
        await self._record(Served(peer, proof, signed, due, acceptance, disputed))
        if forged:
            raise ProtocolError("it accepted a proof with a signature that is not its own")


class _ServedLeg:
    """One leg on its way: pumps what the local engine says into the stream."""

    def __init__(
        self,
        identity: Identity,
        local: LocalBackend,
        stream: Stream,
        job: Job,
        price: Price,
        asked: leg_wire.LegRequest,
    ) -> None:
        self._identity, self._local, self._stream = identity, local, stream
        self._job, self._price, self._asked = job, price, asked
        self._running = RunningCommitment(new_nonce(), min(asked.proof, VERSION))
        self._made = self._shown = 0  # tokens, and log-probabilities, that have been sent
        self._leg: LegRecord | None = None
        self._proof: Proof | None = None
        self._said: Mailbox[Event | ApiError] = Mailbox()
        self._answer: asyncio.Future[leg_wire.Accepted | leg_wire.Disputed | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._pumping: asyncio.Task[None]
        self._listening: asyncio.Task[None]
        self._stopped = False

    @property
    def account(self) -> LegRecord:
        if self._leg is None:
            raise EngineLost("The engine spoke before it had begun; try again.")
        return self._leg

    @property
    def tokens(self) -> int:
        """That were computed, those of the prompt included."""
        leg = self._leg
        return len(leg.prompt or ()) + len(leg.tokens) if leg is not None and leg.begun else 0

    @property
    def said(self) -> leg_wire.Accepted | leg_wire.Disputed | None:
        """What the peer thinks of the proof, None if it has said nothing."""
        return self._answer.result() if self._answer.done() else None

    async def __aenter__(self) -> _ServedLeg:
        self._pumping = asyncio.create_task(self._pump(self._asked.made))
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whatever has happened: the engine stops, nobody reads the stream any more, and what was
        computed until then is in the account."""
        self._stop()
        self._listening.cancel()
        await asyncio.wait([self._pumping, self._listening])
        for event in self._said.left():
            if isinstance(event, Started):
                self._start(event)
            elif isinstance(event, Prompt | Output):
                self._take(event)

    def proof(self) -> Proof | None:
        """Once the engine has ended it; None if nothing was computed, or if that failed here."""
        leg = self._leg
        if self._proof is not None or leg is None or not leg.begun:
            return self._proof
        if leg.finish_reason != ENGINE_LOST:
            self._proof, _ = prove(self._job, self._job.leg, leg, self._price)
        return self._proof

    async def hear_out(self) -> None:
        """What the peer thinks of the proof, if it says so soon."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._answer), _ACCEPT_SECONDS)

    async def _pump(self, made: list[int]) -> None:
        try:
            async with contextlib.aclosing(self._local.serve(self._job, made)) as events:
                async for event in events:
                    if isinstance(event, Started) and event.model_digest != self._asked.digest:
                        raise _another_file(self._job.model)  # replaced while it was being loaded
                    self._said.put(event)
                    if self._stopped and isinstance(event, Started):
                        self._stop()  # again: before, there was no engine to tell
        except ApiError as error:
            self._said.put(error)
        except Exception:
            log.exception("a leg of %s failed", self._job.request_id)
            self._said.put(InternalError("The box failed on this request; its log says why."))

    async def _listen(self) -> None:
        """What the peer says: that it is enough, what it thinks of the proof, or nothing more."""
        said: leg_wire.ToServing | None = None
        for _ in range(_STOPS):
            try:
                said = await leg_wire.receive(self._stream, leg_wire.to_serving, check=_short)
            except PeeringError:
                said = None
            if not isinstance(said, leg_wire.Accepted | leg_wire.Disputed) and not self._stopped:
                self._stop()
            if not isinstance(said, leg_wire.Stop):
                break
        self._answer.set_result(
            said if isinstance(said, leg_wire.Accepted | leg_wire.Disputed) else None
        )

    def _stop(self) -> None:
        self._stopped = True
        self._local.cancel(self._job)

    async def send_all(self, paid: Callable[[], None]) -> bool:
        """All that the engine says; whether there was something to prove.  `paid` is asked before
        the first output.  Raises ApiError if that is to be told, LinkLost."""
        while True:
            events = await self._next()
            if not events:
                await leg_wire.send(self._stream, leg_wire.Alive())
            outputs = [event for event in events if isinstance(event, Output)]
            # Into the account before anything is sent: what is computed is owed, sent or not.
            for event in events:
                if isinstance(event, Started):
                    self._start(event)
                elif isinstance(event, Prompt | Output):
                    self._take(event)
            for event in events:
                if isinstance(event, Prompt):
                    await self._begin(event)
            if outputs:
                if not self._made:
                    paid()
                await leg_wire.send(self._stream, *self._proved(), *self._frames(outputs))
                if outputs[-1].finish_reason:
                    return self.proof() is not None
            if events and isinstance(events[-1], ApiError):
                raise events[-1]

    def _start(self, started: Started) -> None:
        signs = self._running
        self._leg = LegRecord(replace(started, nonce=signs.nonce, proof=signs.version))

    def _proved(self) -> list[leg_wire.LegProof]:
        proof = self.proof()
        if proof is None:
            return []
        signed = sign_proof(self._identity, proof)
        return [leg_wire.LegProof(signed.signed, signed.signature)]

    async def _next(self) -> list[Event | ApiError]:
        """What has come; nothing after a second in which the engine was well but silent."""
        try:
            async with asyncio.timeout(_ALIVE_SECONDS):
                return await self._said.take()
        except TimeoutError:
            return []

    async def _begin(self, prompt: Prompt) -> None:
        started = self.account.started
        await leg_wire.send(
            self._stream,
            leg_wire.LegStarted(
                started.model_digest,
                started.engine.build,
                started.engine.device,
                started.sampling,
                started.tool_style,
                started.thinks,
                self._running.nonce,
                self._running.version,
            ),
            leg_wire.PromptRead(prompt.tokens, prompt.thinking, prompt.text),
        )

    def _take(self, event: Prompt | Output) -> None:
        """Into the account of the leg."""
        leg = self.account
        said = self._records(event, leg.logprobs) if isinstance(event, Output) else []
        leg.take(event, said)

    def _records(self, one: Output, before: int) -> list[bytes]:
        """Of its log-probabilities, of which so many came `before` in this leg."""
        return logprob_records.records(self._job, one.logprobs, self._job.scored + before)

    def _frames(self, outputs: list[Output]) -> Iterator[leg_wire.Outputs]:
        """Vectors are large: of those, one output to a message."""
        most = leg_wire.MOST_OUTPUTS if self._job.inputs is None else 1
        parts = list(self._parts(outputs))
        for at in range(0, len(parts), most):
            batch = parts[at : at + most]
            for one in batch:
                records = self._records(one, self._shown)
                self._running.add(one.text, one.tokens, records, one.vectors)
                self._made += len(one.tokens)
                self._shown += len(one.logprobs)
            job = self._job
            text = mark_text(
                job.request_id, job.choice, job.leg, self._made, self._running.commitment
            )
            mark = self._identity.sign(MARK_DOMAIN, text).hex()
            yield leg_wire.Outputs([_out(one) for one in batch], mark)

    def _parts(self, outputs: list[Output]) -> Iterator[Output]:
        """Vectors that are too many for a message go before the output that they belong to; boxes
        whose proofs are of version 1 cannot read that."""
        for one in outputs:
            vectors = list(one.vectors)
            fit = max(1, _VECTOR_BYTES // len(vectors[0])) if vectors else 0
            while len(vectors) > fit and self._running.version > 1:
                yield Output("", [], None, None, vectors=vectors[:fit])
                vectors = vectors[fit:]
            yield replace(one, vectors=vectors)


def _another_file(model: Model) -> ModelNotFound:
    return ModelNotFound(f"{model.id} is another file here.", param="model")


async def _short(body: bytes) -> None:
    """Nothing that a leg is told is long."""
    if len(body) > _SHORT:
        raise ProtocolError(f"a message of {len(body)} bytes while it is served")


def _out(one: Output) -> leg_wire.Out:
    return leg_wire.Out(
        one.text,
        one.tokens,
        one.finish_reason,
        one.queue_ms,
        one.cached_tokens,
        one.shifted_tokens,
        list(one.logprobs),
        one.stop_string,
        list(one.vectors),
    )


def _refused(error: ApiError) -> leg_wire.LegRefused:
    other = isinstance(error, _OTHERS)
    return leg_wire.LegRefused(error.code, error.message, error.param, error.retry_after, other)
