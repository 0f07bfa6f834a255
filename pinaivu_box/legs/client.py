"""A leg on another box, seen from the coordinator: whatever the peer sends is verified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from msgspec import UNSET

from pinaivu_box import vector_format
from pinaivu_box.engine.messages import Output, Prompt, Tokenized
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
from pinaivu_box.gateway.backend import (
    Counted,
    Event,
    Job,
    Proved,
    Started,
    UpstreamModel,
)
from pinaivu_box.gateway.scopes import ScopeTags
from pinaivu_box.identity import Identity
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_task
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.legs.recorder import LedgerRecorder
from pinaivu_box.legs.verify import LegVerifier, ProtocolViolation, may_answer
from pinaivu_box.network.network import Network
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    EXACT_VERSION,
    EngineBuild,
    LegStatement,
    Proof,
)
from pinaivu_box.routing.router import Destination
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.upstream.answer import estimate_prompt

OPEN_SECONDS = 5.0
_SLOWEST = 100_000  # bytes of a first message that a peer takes in a second at least
STALL_SECONDS = 4.0  # a serving box says at least every second that it is alive
_GAPS = 10.0  # times its usual gap that a stream may be silent, if that is longer
_MAX_GAP_SECONDS = 30.0  # but no longer: else a peer could become slower step by step for ever
ALIVE_SECONDS = 300.0  # that it may say no more than that: a model is loaded, or a queue long
_IDLE_BURST, _IDLE_RATE = 20, 4.0  # messages that say nothing, and a second
_MOST_ALIVE = 1000  # such messages before a count
REFUSED = " refused it: "  # between the peer's name and its reason
_MAX_RETRY_SECONDS = 60  # that a refusal may ask a client to wait
# What a peer may find wrong with a request itself.
_FAULTS = (BadRequest, InvalidBody)


class PeerClient:
    """Asks peers for legs and for tokens of prompts; what it accepts is in the ledger then."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        ledger: LedgerRecorder,
        large: LargeMessages,
        settings: LiveSettings,
    ) -> None:
        self.identity, self.ledger, self.large = identity, ledger, large
        self._network, self._settings = network, settings
        self._tags = ScopeTags()
        self._stops = TaskSet()

    def start(self, job: Job, to: Destination) -> PeerLeg:
        """A leg at a peer, which does nothing until it is run."""
        return PeerLeg(self, job, to)

    async def tokenize(
        self, job: Job, to: Destination, tokens: list[int] | None, *, plain: bool
    ) -> tuple[Tokenized, int]:
        """See `gateway.backend.Tokenizer`.  Raises as `PeerLeg.run`."""
        stream = await self.open(to)
        check = self.large.to_coordinator(to.node_id)
        count = leg_wire.Count(to_task(job), to.digest, tokens, plain, patient=True)
        answer: leg_wire.ToCoordinator | None = None
        try:
            patience = OPEN_SECONDS + _first_patience(await _send(stream, count))
            async with asyncio.timeout(ALIVE_SECONDS):
                for _ in range(_MOST_ALIVE):
                    answer = await leg_wire.receive(
                        stream, leg_wire.to_coordinator, patience, check
                    )
                    if not isinstance(answer, leg_wire.Alive):
                        break
        except (PeeringError, TimeoutError) as error:
            raise _lost(to, error) from error
        finally:
            stream.abandon()
        if isinstance(answer, leg_wire.LegRefused):
            raise _refusal(answer, to)
        if not isinstance(answer, leg_wire.Tokens) or not may_answer(answer, job, tokens):
            raise PeerFaulty(f"{to.name} did not answer a count", node_id=to.node_id)
        return Tokenized(job.id, answer.tokens, answer.text, answer.thinking), answer.context

    async def open(self, to: Destination) -> Stream:
        try:
            return await self._network.open(to.node_id, leg_wire.PURPOSE, OPEN_SECONDS)
        except (PeeringError, TimeoutError) as error:
            raise _lost(to, error) from error

    def request(self, job: Job, to: Destination) -> leg_wire.LegRequest:
        tag = self._tags.of(job.scope, to.node_id) if job.cache and job.scope else None
        trace = job.trace if self._settings.config.tracing.peers else None
        return leg_wire.LegRequest(
            to_task(job, tag),
            to.digest,
            job.output,
            to.prices,
            to.currency,
            to.pays_prompt,
            EXACT_VERSION,
            trace.header if trace is not None else UNSET,
        )

    def stop(self, stream: Stream) -> None:
        """Tell a peer to stop, if its leg has not ended by now."""

        async def tell() -> None:
            with contextlib.suppress(PeeringError, ValueError):
                await leg_wire.send(stream, leg_wire.StopLeg())

        self._stops.spawn(tell())


class PeerLeg:
    """See `gateway.backend.Leg`.  EngineLost names the peer; PeerFaulty says that it has violated
    the protocol.  Other errors are what the peer refused with."""

    def __init__(self, client: PeerClient, job: Job, to: Destination) -> None:
        self._client, self._job, self._to = client, job, to
        self._check = client.large.to_coordinator(to.node_id)
        self._verifier = LegVerifier(job, to)
        self._stream: Stream | None = None  # once the peer was asked
        self._cancelled = False
        self._vectors: list[bytes] = []
        self._gap = 0.0
        self._first = 0.0  # how long the first message may take
        self._since = self._heard = asyncio.get_running_loop().time()
        self._idle = 0  # messages that say nothing

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = self._verifier.stopped = True
            if self._stream is not None:
                self._client.stop(self._stream)

    def _is_cancelled(self) -> bool:
        """It may be since it was last asked."""
        return self._cancelled

    async def run(self, take: Callable[[Event], None]) -> None:
        if self._is_cancelled():
            return
        request = self._client.request(self._job, self._to)
        stream = await self._client.open(self._to)
        ended = False
        try:
            if self._is_cancelled():
                return
            self._first = _first_patience(await _send(stream, request))
            self._stream = stream
            if self._is_cancelled():
                self._client.stop(stream)
            while not ended:
                message = await self._receive(stream)
                for event in await self._handle(stream, message):
                    ended = isinstance(event, Output) and event.finish_reason is not None
                    take(event)
        except ProtocolViolation as violation:
            reason = f"{self._to.name} violated the protocol: {violation}"
            raise PeerFaulty(reason, node_id=self._to.node_id) from None
        except PeeringError as error:
            raise _lost(self._to, error) from error
        finally:
            if ended:
                stream.leave()
            else:
                stream.abandon()

    async def _handle(self, stream: Stream, message: leg_wire.ToCoordinator) -> Sequence[Event]:
        """The events of a message."""
        match message:
            case leg_wire.Outputs():
                return await self._take(stream, message)
            case leg_wire.LegStarted():
                return [self._begin(message)]
            case leg_wire.PromptRead():
                self._verifier.read(message)
                prompt = Prompt(message.tokens, message.thinking, message.text)
                return [self._estimate(), prompt] if self._to.of_upstream else [prompt]
            case leg_wire.LegProof():
                self._verifier.keep_proof(message)
            case leg_wire.LegRefused() if self._verifier.has_output:
                reason = wire.printable(message.message)
                raise EngineLost(f"{self._to.name} gave up: {reason}", node_id=self._to.node_id)
            case leg_wire.LegRefused():
                raise _refusal(message, self._to)
            case leg_wire.Tokens():
                raise ProtocolViolation("unexpected message")
        return ()

    async def _receive(self, stream: Stream) -> leg_wire.ToCoordinator:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            patience = max(STALL_SECONDS, self._first, min(_MAX_GAP_SECONDS, _GAPS * self._gap))
            message = await leg_wire.receive(stream, leg_wire.to_coordinator, patience, self._check)
        except TimeoutError:
            raise self._stalled(f"nothing came for {loop.time() - began:.1f} s") from None
        if message is None:
            raise ProtocolViolation("the stream ended before the leg")
        now, self._first = loop.time(), 0.0
        if isinstance(message, leg_wire.Outputs):
            self._gap += 0.2 * (now - began - self._gap)
        if _has_content(message):
            self._heard, self._idle = now, 0
            return message
        self._idle += 1
        if now - self._heard > ALIVE_SECONDS:
            raise self._stalled(f"it said nothing but that it is alive for {ALIVE_SECONDS:g} s")
        if self._idle > _IDLE_BURST + _IDLE_RATE * (now - self._since):
            raise ProtocolViolation("too many messages without content")
        return message

    def _begin(self, message: leg_wire.LegStarted) -> Started:
        if self._job.sampling.min_tokens and not message.sampling.min_tokens:
            raise NoNodesAvailable(f"{self._to.name} runs a version that knows no min_tokens")
        self._verifier.begin(message)
        asked = message.upstream
        return Started(
            self._to.node_id,
            message.digest,
            EngineBuild(message.build, message.device),
            message.sampling,
            message.tool_style,
            message.thinks,
            nonce=message.nonce,
            proof=message.proof,
            exactness="" if message.exactness is UNSET else message.exactness,
            upstream=None if asked is UNSET else UpstreamModel(asked.name, asked.model),
        )

    def _estimate(self) -> Counted:
        """Of a leg at a peer's upstream, until the peer has said how many tokens it had."""
        return Counted(
            estimate_prompt(self._job), 0, self._verifier.estimated_tokens, estimated=True
        )

    async def _take(self, stream: Stream, message: leg_wire.Outputs) -> list[Event]:
        self._verifier.take(message)
        for output in message.outputs:
            output.mark = message.mark
            if self._job.inputs is not None:
                self._collect_vectors(output)
        outputs: list[Event] = [*message.outputs]
        if self._to.of_upstream:
            outputs.insert(0, self._estimate())
        reason = message.outputs[-1].finish_reason
        if reason is not None and self._verifier.end(message):
            proved = await self._accept(stream, reason)
            outputs[-1:-1] = [*_counted(proved.proof), proved]
        return outputs

    def _collect_vectors(self, output: Output) -> None:
        """They come in several parts, if they are many, and are all said with the end; those of a
        box of version 1 are as long as its model makes them."""
        self._vectors += output.vectors
        output.vectors = []
        if output.finish_reason is not None:
            output.vectors, size = self._vectors, self._job.dimensions
            if size is not None:
                output.vectors = [vector_format.shortened(vector, size) for vector in self._vectors]

    async def _accept(self, stream: Stream, reason: str) -> Proved:
        """Verify the proof, sign that it is accepted, and keep it."""
        client, to = self._client, self._to
        try:
            proof, signed = self._verifier.prove(reason)
        except ProtocolViolation as violation:
            await _conclude(stream, leg_wire.Disputed(str(violation)[:500]))
            raise
        acceptance = client.identity.sign(ACCEPTANCE_DOMAIN, signed.signed.encode())
        await client.ledger.keep(
            ledger_entry.of_leg(to.node_id, proof, signed, to.pays_prompt, acceptance)
        )
        # If it is lost now, the ledger finds it again.
        await _conclude(stream, leg_wire.Accepted(acceptance.hex()))
        return Proved(proof, signed, self._verifier.output.opening, acceptance)

    def _stalled(self, reason: str) -> EngineLost:
        return EngineLost(f"{self._to.name} stalled: {reason}", node_id=self._to.node_id)


def _counted(statement: LegStatement) -> list[Counted]:
    if isinstance(statement, Proof):
        return []
    return [
        Counted(
            statement.prompt_tokens,
            statement.cached_tokens,
            statement.completion_tokens,
            statement.tokens_counted_by == "estimate",
        )
    ]


def _first_patience(size: int) -> float:
    """For how many seconds a peer may say nothing after a message of `size` bytes: it has to be
    carried there, and looked at in a sandbox."""
    return STALL_SECONDS + size / _SLOWEST


async def _send(stream: Stream, message: leg_wire.LegRequest | leg_wire.Count) -> int:
    """Send the first message on a stream, of so many bytes.  If it is too large, it raises
    NoNodesAvailable."""
    try:
        return await leg_wire.send(stream, message)
    except ValueError as error:
        raise NoNodesAvailable(f"The request is too large for a peer: {error}.") from error


async def _conclude(stream: Stream, message: leg_wire.Accepted | leg_wire.Disputed) -> None:
    with contextlib.suppress(PeeringError):
        await leg_wire.send(stream, message)
        await stream.finish()


def _refusal(refused: leg_wire.LegRefused, to: Destination) -> ApiError:
    """NoNodesAvailable if another box may serve the request, else what is wrong with it."""
    message = wire.printable(refused.message)
    error = by_code(refused.code, message, wire.printable(refused.param) if refused.param else None)
    if refused.other or not isinstance(error, _FAULTS):
        wait = min(refused.retry_after or 1, _MAX_RETRY_SECONDS)
        return NoNodesAvailable(f"{to.name}{REFUSED}{message}", retry_after=wait)
    return error


def _lost(to: Destination, error: BaseException) -> EngineLost:
    why = error.message if isinstance(error, PeeringError) else "it did not answer in time"
    kind = PeerFaulty if isinstance(error, ProtocolError) else EngineLost
    return kind(f"{to.name} was lost: {wire.printable(why)}", node_id=to.node_id)


def _has_content(message: leg_wire.ToCoordinator) -> bool:
    if isinstance(message, leg_wire.Outputs):
        return any(
            output.tokens or output.finish_reason or output.logprobs or output.vectors
            for output in message.outputs
        )
    return not isinstance(message, leg_wire.Alive)
