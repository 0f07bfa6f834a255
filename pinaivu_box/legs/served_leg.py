"""One leg that is computed here for a peer: the engine's events become messages on its stream, with
the marks and the proof that `verify` checks on the other side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from msgspec import UNSET, UnsetType, structs

from pinaivu_box.engine.messages import Output, Prompt
from pinaivu_box.errors import ApiError, InternalError, ModelNotFound, PeeringError, ProtocolError
from pinaivu_box.gateway import logprob_records
from pinaivu_box.gateway.backend import Backend, Event, Job, Started, stopped
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.metering import prove, upstream_leg
from pinaivu_box.gateway.records import ENGINE_LOST, LegRecord
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.verify import most_of_upstream
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts import receipt
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import LegStatement, Price, SignedProof, UpstreamLeg
from pinaivu_box.transport.link import Stream
from pinaivu_box.upstream.upstream import OWNER

log = logging.getLogger("pinaivu.legs")

ALIVE_SECONDS = 1.0
_ACCEPT_SECONDS = 10.0
_MAX_MESSAGE_BYTES = 4096  # of what the peer may send while its leg runs
_MAX_MESSAGES = 8  # that it may send
_MAX_VECTOR_BYTES = leg_wire.MAX_MESSAGE_BYTES // 2  # of vectors in one message


class ServedLeg:
    """It runs while this is entered.  `record` is of what was computed, sent or not; None before
    the engine has begun.  `verdict` is what the peer thinks of the proof, None if it said nothing.
    """

    def __init__(
        self,
        stream: Stream,
        leg_request: leg_wire.LegRequest,
        job: Job,
        backend: Backend,
        identity: Identity,
        price: Price,
    ) -> None:
        self.record: LegRecord | None = None
        self.verdict: leg_wire.Accepted | leg_wire.Disputed | None = None
        self._stream, self._job, self._digest = stream, job, leg_request.digest
        self._identity, self._price = identity, price
        self._leg = backend.start(job)
        self._events: Mailbox[Event | ApiError] = Mailbox()
        self._reads_exactness = leg_request.proof >= receipt.EXACT_VERSION
        version = min(leg_request.proof, receipt.VERSION)
        if job.model.owner == OWNER:
            version = receipt.UPSTREAM_VERSION
        self._sent = RunningCommitment(new_nonce(), version)
        self._has_sent_output = False
        self._tokens = self._logprobs = 0  # that have been sent
        self._proof: tuple[LegStatement, SignedProof] | None = None
        self._computing: asyncio.Task[None]
        self._listening: asyncio.Task[None]

    @property
    def tokens(self) -> int:
        """That were computed, those of the prompt included."""
        record = self.record
        return record.prompt_tokens + record.completion_tokens if record and record.begun else 0

    def proof(self) -> tuple[LegStatement, SignedProof] | None:
        """Once the engine has ended it; None if nothing was computed, or if that failed here."""
        record = self.record
        if self._proof is None and record and record.begun and record.finish_reason != ENGINE_LOST:
            if record.started.upstream is not None:
                statement = _within_bounds(upstream_leg(record, self._price)[0], record)
                self._proof = statement, receipt.sign_upstream_leg(self._identity, statement)
            else:
                proof, _ = prove(record, self._price)
                self._proof = proof, receipt.sign_proof(self._identity, proof)
        return self._proof

    async def __aenter__(self) -> ServedLeg:
        self._computing = asyncio.create_task(self._compute())
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whatever has happened: the engine stops, and nobody reads the stream any more."""
        self._leg.cancel()
        self._listening.cancel()
        await asyncio.wait([self._computing, self._listening])

    async def send_all(self, check_paid: Callable[[], None]) -> bool:
        """Send what the engine says; returns whether there was something to prove.

        `check_paid` is called before the first tokens are sent.  Raises ApiError if that is to be
        told, LinkLost.
        """
        while True:
            events = await self._next()
            messages: list[leg_wire.ToCoordinator] = [] if events else [leg_wire.Alive()]
            messages += self._beginning(events)
            outputs = [event for event in events if isinstance(event, Output)]
            ended = bool(outputs) and outputs[-1].finish_reason is not None
            proof = self.proof() if ended else None
            if outputs and not self._has_sent_output:
                check_paid()
                self._has_sent_output = True
            if proof is not None:
                messages.append(leg_wire.LegProof(proof[1].signed, proof[1].signature))
            messages += self._marked(outputs)
            if messages:
                await leg_wire.send(self._stream, *messages)
            if ended:
                return proof is not None
            if events and isinstance(events[-1], ApiError):
                raise events[-1]

    async def hear_verdict(self) -> None:
        """Wait until the peer has accepted or disputed the proof, but not for long."""
        await asyncio.wait([self._listening], timeout=_ACCEPT_SECONDS)

    async def _next(self) -> list[Event | ApiError]:
        """What has come; nothing after a second in which the engine was well but silent."""
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                return await self._events.take()
        except TimeoutError:
            return []

    # -- what is sent ------------------------------------------------------------------------------

    def _beginning(self, events: list[Event | ApiError]) -> list[leg_wire.ToCoordinator]:
        """Both messages come with the prompt: before that the leg may still be refused."""
        for event in events:
            if isinstance(event, Prompt) and self.record is not None:
                started = self.record.started
                began = leg_wire.LegStarted(
                    started.model_digest,
                    started.engine.build,
                    started.engine.device,
                    started.sampling,
                    started.tool_style,
                    started.thinks,
                    self._sent.nonce,
                    self._sent.version,
                    asked_upstream(started),
                    started.exactness or UNSET,
                )
                return [began, leg_wire.PromptRead(event.tokens, event.thinking, event.text)]
        return []

    def _marked(self, outputs: list[Output]) -> Iterator[leg_wire.Outputs]:
        """Vectors are large: of those, one output to a message."""
        max_outputs = leg_wire.MAX_OUTPUTS if self._job.inputs is None else 1
        parts = list(self._parts(outputs))
        for at in range(0, len(parts), max_outputs):
            batch = parts[at : at + max_outputs]
            # Nothing that an engine here makes is out of bounds.
            yield leg_wire.Outputs(cast("list[leg_wire.Out]", batch), self._mark(batch))

    def _mark(self, outputs: list[Output]) -> str:
        """The mark of all that has been sent, these outputs included."""
        job = self._job
        for output in outputs:
            records = logprob_records.records(job, output.logprobs, self._logprobs)
            self._sent.add(output.text, output.tokens, records, output.vectors)
            self._tokens += len(output.tokens)
            self._logprobs += len(output.logprobs)
        commitment = self._sent.commitment
        text = receipt.mark_text(job.request_id, job.choice, job.leg, self._tokens, commitment)
        return self._identity.sign(receipt.MARK_DOMAIN, text).hex()

    def _parts(self, outputs: list[Output]) -> Iterator[Output]:
        """Vectors that are too many for a message go before the output that they belong to; boxes
        whose proofs are of version 1 cannot read that."""
        for output in outputs:
            vectors = output.vectors
            fit = max(1, _MAX_VECTOR_BYTES // len(vectors[0])) if vectors else 0
            while len(vectors) > fit and self._sent.version > 1:
                yield Output("", [], vectors=vectors[:fit])
                vectors = vectors[fit:]
            yield output if vectors is output.vectors else structs.replace(output, vectors=vectors)

    # -- tasks beside it ---------------------------------------------------------------------------

    async def _compute(self) -> None:
        """Record what the engine says, before anything of it is sent: it is owed, sent or not."""
        try:
            await self._leg.run(self._take)
            if self.record is None:
                raise stopped()
        except ApiError as error:
            self._events.put(error)
        except Exception:
            log.exception("a leg of %s failed", self._job.request_id)
            self._events.put(InternalError("The box failed on this request; its log says why."))

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            if event.model_digest != self._digest:
                raise another_file(self._job.model)  # replaced while it was loaded
            started = replace(
                event,
                nonce=self._sent.nonce,
                proof=self._sent.version,
                exactness=event.exactness if self._reads_exactness else "",
            )
            self.record = LegRecord(self._job, started)
        elif self.record is not None:
            self.record.take(event)
        self._events.put(event)

    async def _listen(self) -> None:
        """To what the peer says: that it is enough, its verdict on the proof, or nothing more."""
        for _ in range(_MAX_MESSAGES):
            try:
                message = await leg_wire.receive(
                    self._stream, leg_wire.to_serving, check=_check_size
                )
            except PeeringError:
                message = None
            if isinstance(message, leg_wire.Accepted | leg_wire.Disputed):
                self.verdict = message
                return
            self._leg.cancel()
            if not isinstance(message, leg_wire.StopLeg):
                return


def asked_upstream(started: Started) -> leg_wire.AskedUpstream | UnsetType:
    if started.upstream is None:
        return UNSET
    return leg_wire.AskedUpstream(started.upstream.upstream, started.upstream.model)


def _within_bounds(statement: UpstreamLeg, record: LegRecord) -> UpstreamLeg:
    """With no more tokens than the peer takes (`verify.most_of_upstream`): an upstream may count
    thoughts that it does not show."""
    prompt, completion = most_of_upstream(record.job, len("".join(record.text).encode()))
    counted = record.counted
    if counted is None or (counted.prompt <= prompt and counted.completion <= completion):
        return statement
    prompt = min(prompt, counted.prompt)
    return structs.replace(
        statement,
        prompt_tokens=prompt,
        cached_tokens=min(prompt, counted.cached),
        completion_tokens=min(completion, counted.completion),
        tokens_counted_by="estimate",
    )


def another_file(model: Model) -> ModelNotFound:
    return ModelNotFound(f"{model.id} is another file here.", param="model")


async def _check_size(body: bytes) -> None:
    if len(body) > _MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes while the leg is served")
