"""The backend that serves with another box; whatever it says is checked against what it sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from pinaivu_box import vector_format
from pinaivu_box.errors import (
    ApiError,
    BadRequest,
    EngineLost,
    InvalidBody,
    NoNodesAvailable,
    PeerFaulty,
    PeeringError,
    ProtocolError,
    by_code,
)
from pinaivu_box.gateway.backend import Event, Job, Output, Prompt, Proved, Started
from pinaivu_box.gateway.scopes import ScopeTags
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_task
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.legs.verify import LegVerifier, ProtocolViolation, counts
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    VERSION,
    EngineInfo,
    SignedProof,
    cost,
)
from pinaivu_box.routing.candidates import Destination
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

OPEN_SECONDS = 5.0
STALL_SECONDS = 4.0  # a serving box says at least every second that it is alive
_GAPS = 10.0  # times its usual gap that a stream may be silent, if that is longer
_LONGEST_GAP = 30.0  # but no longer: else who gets slower step by step is borne for ever
ALIVE_SECONDS = 300.0  # that it may say no more than that: a model is loaded, or a queue long
_IDLE_BURST, _IDLE_RATE = 20, 4.0  # messages that say nothing, and a second
_LONGEST_WAIT = 60  # seconds that a refusal may ask a client to wait
# What a peer may find wrong with a request itself.
_FAULTS = (BadRequest, InvalidBody)


class Opener(Protocol):
    async def open(self, peer: str, purpose: str, timeout: float = ...) -> Stream: ...

    async def look(self, model: str) -> None: ...


@dataclass(frozen=True)
class AcceptedLeg:
    """A leg that a peer has served for us, proven and accepted; `amount` in 10^-9."""

    peer: str
    proved: Proved
    amount: int


Keep = Callable[[AcceptedLeg], Awaitable[None]]


class PeerBackend:
    """`keep` gets every leg that was accepted."""

    def __init__(
        self, identity: Identity, network: Opener, keep: Keep, large: LargeMessages
    ) -> None:
        self._identity, self._network, self._keep = identity, network, keep
        self._large = large
        self._legs: dict[str, list[_PeerLeg]] = {}  # of a job: two if it was hedged
        self._stops: set[asyncio.Task[None]] = set()
        self._tags = ScopeTags()
        self.look = network.look

    async def serve(self, job: Job, made: list[int], to: Destination) -> AsyncGenerator[Event]:
        """As `Backend.serve`.  EngineLost names the peer; PeerFaulty says that it broke the rules.
        Other errors are what the peer refused with."""
        tag = self._tags.of(job.scope, to.node_id) if job.cache and job.scope else None
        task = to_task(job, tag)
        ask = leg_wire.LegRequest(
            task, to.digest, made, to.prices, to.currency, to.pays_prompt, VERSION
        )
        stream = await self._begin(to, ask)
        leg = _PeerLeg(self._identity, job, made, to, stream, self._keep, self._large)
        self._legs.setdefault(job.id, []).append(leg)
        ended = False
        try:
            async for event in leg.listen():
                ended = isinstance(event, Output) and event.finish_reason is not None
                yield event
        except PeeringError as error:
            raise _lost(to, error) from error
        finally:
            self._legs[job.id].remove(leg)
            if not self._legs[job.id]:
                del self._legs[job.id]
            if not ended:
                stream.abandon()

    def cancel(self, job: Job, node_id: str | None = None) -> bool:
        """All its legs, or the one at that node; whether there is any."""
        found = [one for one in self._legs.get(job.id, ()) if node_id in (None, one.node_id)]
        for leg in found:
            task = asyncio.create_task(leg.stop())
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)
        return bool(found)

    async def count(
        self, job: Job, to: Destination, tokens: list[int] | None = None, *, plain: bool = False
    ) -> leg_wire.Tokens:
        """The prompt's tokens and the context there.  Raises as `serve`."""
        stream = await self._begin(to, leg_wire.Count(to_task(job), to.digest, tokens, plain))
        try:
            async with asyncio.timeout(OPEN_SECONDS + STALL_SECONDS):
                check = self._large.to_coordinator(to.node_id)
                said = await leg_wire.receive(stream, leg_wire.to_coordinator, check=check)
        except (PeeringError, TimeoutError) as error:
            raise _lost(to, error) from error
        finally:
            stream.abandon()
        if isinstance(said, leg_wire.LegRefused):
            raise refusal(said, to)
        if not isinstance(said, leg_wire.Tokens) or not counts(said, job, tokens):
            raise PeerFaulty(f"{to.name} did not answer a count", node_id=to.node_id)
        return said

    async def _begin(
        self, to: Destination, message: leg_wire.LegRequest | leg_wire.Count
    ) -> Stream:
        try:
            stream = await self._network.open(to.node_id, leg_wire.PURPOSE, OPEN_SECONDS)
        except (PeeringError, TimeoutError) as error:
            raise _lost(to, error) from error
        try:
            await leg_wire.send(stream, message)
        except PeeringError as error:
            raise _lost(to, error) from error
        except ValueError as error:
            stream.abandon()
            raise NoNodesAvailable(f"The request is too large for a peer: {error}.") from error
        except BaseException:
            stream.abandon()
            raise
        return stream


class _PeerLeg:
    """The conversation about a leg that a peer serves, while it does."""

    def __init__(
        self,
        identity: Identity,
        job: Job,
        made: list[int],
        to: Destination,
        stream: Stream,
        keep: Keep,
        large: LargeMessages,
    ) -> None:
        self.stream, self.node_id = stream, to.node_id
        self._check = large.to_coordinator(to.node_id)
        self._identity, self._to, self._keep = identity, to, keep
        self._job, self._seen = job, LegVerifier(job, made, to)
        self._began = self._read = self._spoke = False
        self._proved: leg_wire.LegProof | None = None
        self._vectors: list[bytes] = []
        self._gap = 0.0
        self._since = self._heard = asyncio.get_running_loop().time()
        self._idle = 0  # messages that say nothing

    async def listen(self) -> AsyncGenerator[Event]:
        try:
            async for event in self._listen():
                yield event
        except ProtocolViolation as lie:
            raise self._faulty(str(lie)) from None

    async def stop(self) -> None:
        self._seen.stopped = True
        with contextlib.suppress(PeeringError, ValueError):  # it may have ended by now
            await leg_wire.send(self.stream, leg_wire.Stop())

    async def _listen(self) -> AsyncGenerator[Event]:
        while True:
            message = await self._receive()
            match message:
                case leg_wire.Alive():
                    pass
                case leg_wire.LegRefused() if not self._spoke:
                    raise refusal(message, self._to)
                case leg_wire.LegRefused():
                    why = wire.printable(message.message)
                    raise EngineLost(f"{self._to.name} gave up: {why}", node_id=self._to.node_id)
                case leg_wire.LegStarted() if not self._began:
                    self._began = True
                    yield self._begin(message)
                case leg_wire.PromptRead() if self._began and not self._read:
                    self._read = True
                    self._seen.read(message)
                    yield Prompt(message.tokens, message.thinking, message.text)
                case leg_wire.LegProof() if self._read and self._proved is None:
                    self._proved = message
                case leg_wire.Outputs() if self._read and message.outputs:
                    self._spoke = True
                    for event in await self._take(message):
                        yield event
                    if message.outputs[-1].finish_reason is not None:
                        return
                case _:
                    raise ProtocolViolation("it spoke out of turn")

    async def _receive(self) -> leg_wire.ToCoordinator:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            patience = max(STALL_SECONDS, min(_LONGEST_GAP, _GAPS * self._gap))
            message = await leg_wire.receive(
                self.stream, leg_wire.to_coordinator, patience, self._check
            )
        except TimeoutError:
            raise self._stalled(f"nothing came for {loop.time() - began:.1f} s") from None
        if message is None:
            raise ProtocolViolation("it ended the request without a word")
        now = loop.time()
        if isinstance(message, leg_wire.Outputs):
            self._gap += 0.2 * (now - began - self._gap)
        if _says_something(message):
            self._heard, self._idle = now, 0
            return message
        self._idle += 1
        if now - self._heard > ALIVE_SECONDS:
            raise self._stalled(f"it said nothing but that it is alive for {ALIVE_SECONDS:g} s")
        if self._idle > _IDLE_BURST + _IDLE_RATE * (now - self._since):
            raise ProtocolViolation("it talks without saying anything")
        return message

    def _begin(self, began: leg_wire.LegStarted) -> Started:
        if self._job.sampling.min_tokens and not began.sampling.min_tokens:
            raise NoNodesAvailable(f"{self._to.name} runs a version that knows no min_tokens")
        self._seen.begin(began)
        return Started(
            self._to.node_id,
            began.digest,
            EngineInfo(began.build, began.device),
            began.sampling,
            began.tool_style,
            began.thinks,
            nonce=began.nonce,
            proof=began.proof,
        )

    async def _take(self, message: leg_wire.Outputs) -> list[Event]:
        self._seen.take(message)
        made = [self._output(one, message.mark) for one in message.outputs]
        reason = message.outputs[-1].finish_reason
        if reason is None:
            return list(made)
        if not self._seen.end(message):
            return list(made)
        return [*made[:-1], await self._accept(reason), made[-1]]

    def _output(self, one: leg_wire.Out, mark: str) -> Output:
        """Vectors come in several parts, if they are many, and with the end all of them are said;
        those of a box of version 1 are as long as its model makes them."""
        self._vectors += one.vectors
        vectors: list[bytes] = []
        if one.finish_reason is not None:
            vectors, size = self._vectors, self._job.dimensions
            if size is not None:
                vectors = [vector_format.shortened(vector, size) for vector in vectors]
        return Output(
            one.text,
            one.tokens,
            one.finish_reason,
            one.queue_ms,
            one.cached_tokens,
            one.shifted_tokens,
            one.logprobs,
            one.stop_string,
            vectors,
            mark,
        )

    async def _accept(self, reason: str) -> Proved:
        """The proof, once it is known to say what has been seen."""
        try:
            proof = self._seen.prove(self._proved, reason)
        except ProtocolViolation as lie:
            with contextlib.suppress(PeeringError):
                await leg_wire.send(self.stream, leg_wire.Disputed(str(lie)[:500]))
                await self.stream.finish()
            raise
        assert self._proved is not None  # or it would have been a lie
        signed = self._proved.signed
        acceptance = self._identity.sign(ACCEPTANCE_DOMAIN, signed.encode())
        proved = Proved(
            proof,
            SignedProof(signed, self._proved.signature),
            self._seen.output.opening,
            acceptance,
        )
        due = cost(proof, self._to.pays_prompt)
        await self._keep(AcceptedLeg(self._to.node_id, proved, due))
        with contextlib.suppress(PeeringError):  # if it is lost now, the ledger finds it again
            await leg_wire.send(self.stream, leg_wire.Accepted(acceptance.hex()))
            await self.stream.finish()
        return proved

    def _faulty(self, why: str) -> PeerFaulty:
        return PeerFaulty(f"{self._to.name} broke the rules: {why}", node_id=self._to.node_id)

    def _stalled(self, why: str) -> EngineLost:
        return EngineLost(f"{self._to.name} stalled: {why}", node_id=self._to.node_id)


def refusal(said: leg_wire.LegRefused, to: Destination) -> ApiError:
    """Of the peer, if somebody else may serve the request; else of the request."""
    message = wire.printable(said.message)
    error = by_code(said.code, message, wire.printable(said.param) if said.param else None)
    if said.other or not isinstance(error, _FAULTS):
        wait = min(said.retry_after or 1, _LONGEST_WAIT)
        return NoNodesAvailable(f"{to.name} refused it: {message}", retry_after=wait)
    return error


def _lost(to: Destination, error: BaseException) -> EngineLost:
    why = error.message if isinstance(error, PeeringError) else "it did not answer in time"
    kind = PeerFaulty if isinstance(error, ProtocolError) else EngineLost
    return kind(f"{to.name} was lost: {wire.printable(why)}", node_id=to.node_id)


def _says_something(message: leg_wire.ToCoordinator) -> bool:
    if isinstance(message, leg_wire.Outputs):
        return any(
            one.tokens or one.finish_reason or one.logprobs or one.vectors
            for one in message.outputs
        )
    return not isinstance(message, leg_wire.Alive)
