"""What a serving box sends of a leg, marked and signed: what `verify` checks on the other side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from msgspec import structs

from pinaivu_box.engine.messages import Output, Prompt
from pinaivu_box.gateway import logprob_records
from pinaivu_box.gateway.backend import Job, Started
from pinaivu_box.gateway.metering import prove
from pinaivu_box.gateway.records import ENGINE_LOST, LegRecord
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    VERSION,
    Price,
    Proof,
    SignedProof,
    mark_text,
    sign_proof,
)

_MAX_VECTOR_BYTES = leg_wire.MAX_MESSAGE_BYTES // 2  # of vectors in one message


class LegSigner:
    """The messages of one leg, in the order in which they are sent.  `version` is the highest one
    of proofs that the coordinator reads."""

    def __init__(self, identity: Identity, job: Job, price: Price, version: int) -> None:
        self._identity, self._job, self._price = identity, job, price
        self._sent = RunningCommitment(new_nonce(), min(version, VERSION))
        self._tokens = self._logprobs = 0  # that have been sent
        self._proof: tuple[Proof, SignedProof] | None = None

    @property
    def has_sent_tokens(self) -> bool:
        return self._tokens > 0

    def record(self, started: Started) -> LegRecord:
        """The record of the leg, whose proof this box signs."""
        return LegRecord(
            self._job, replace(started, nonce=self._sent.nonce, proof=self._sent.version)
        )

    def begin(self, started: Started) -> leg_wire.LegStarted:
        return leg_wire.LegStarted(
            started.model_digest,
            started.engine.build,
            started.engine.device,
            started.sampling,
            started.tool_style,
            started.thinks,
            self._sent.nonce,
            self._sent.version,
        )

    def read(self, prompt: Prompt) -> leg_wire.PromptRead:
        return leg_wire.PromptRead(prompt.tokens, prompt.thinking, prompt.text)

    def outputs(self, outputs: list[Output]) -> Iterator[leg_wire.Outputs]:
        """Vectors are large: of those, one output to a message."""
        max_outputs = leg_wire.MAX_OUTPUTS if self._job.inputs is None else 1
        parts = list(self._parts(outputs))
        for at in range(0, len(parts), max_outputs):
            yield self._marked(parts[at : at + max_outputs])

    def _marked(self, outputs: list[Output]) -> leg_wire.Outputs:
        job = self._job
        for output in outputs:
            records = logprob_records.records(job, output.logprobs, self._logprobs)
            self._sent.add(output.text, output.tokens, records, output.vectors)
            self._tokens += len(output.tokens)
            self._logprobs += len(output.logprobs)
        text = mark_text(job.request_id, job.choice, job.leg, self._tokens, self._sent.commitment)
        mark = self._identity.sign(MARK_DOMAIN, text).hex()
        # Nothing that an engine here makes is out of bounds.
        return leg_wire.Outputs(cast("list[leg_wire.Out]", outputs), mark)

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

    def prove(self, record: LegRecord) -> tuple[Proof, SignedProof] | None:
        """The proof, once the engine has ended the leg; None if it has not, or computed nothing."""
        if self._proof is None and record.begun and record.finish_reason != ENGINE_LOST:
            proof, _ = prove(record, self._price)
            self._proof = proof, sign_proof(self._identity, proof)
        return self._proof
