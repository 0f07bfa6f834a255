"""Verifies what a peer sends of a leg against what was requested; pure.

Without the model nobody can see whether the tokens are its own, or the text is that of the tokens.
The proof commits to both, so whoever has the file can show it later.  Of a peer's upstream there
are no token ids: the text is seen, and bounds how many tokens may be billed (`most_of_upstream`).
"""

from __future__ import annotations

import math
from array import array

from msgspec import UNSET

from pinaivu_box import amount
from pinaivu_box.chat_format import STYLES
from pinaivu_box.engine.messages import Sampling, TokenLogprob
from pinaivu_box.gateway import logprob_records
from pinaivu_box.gateway.backend import Job, asked_text
from pinaivu_box.identity import verify
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    EXACT_VERSION,
    MARK_DOMAIN,
    UPSTREAM_VERSION,
    VERSION,
    EngineBuild,
    LegStatement,
    Proof,
    SignedProof,
    UpstreamLeg,
    canonical,
    mark_text,
    sampling_record,
)
from pinaivu_box.receipts.verify import is_signed, read_statement
from pinaivu_box.routing.router import Destination
from pinaivu_box.upstream.answer import estimate_prompt, estimate_tokens
from pinaivu_box.upstream.request import sent_of

_MAX_TOKEN_CHARACTERS = 1024  # vocabularies have runs of 256 spaces
# A token has at least a byte, but a template says something of its own, and may repeat its tools.
_TEMPLATE_TOKENS, _REPEATS = 8192, 2
_FINISH_REASONS = ("stop", "length", "cancelled")
_UPSTREAM_FINISH_REASONS = (*_FINISH_REASONS, "content_filter")
_UNSEEN_TOKENS = 64  # of an upstream's answer: marks, and the end
_UNSEEN_PROMPT_TOKENS = 256  # of its prompt: what the template says of its own


class ProtocolViolation(Exception):
    """What is wrong, as it follows "NAME violated the protocol: "."""


class LegVerifier:
    """All methods raise ProtocolViolation.  `stopped`: the peer was asked to stop."""

    def __init__(self, job: Job, to: Destination) -> None:
        self.stopped = False
        self.output: commitment.RunningCommitment
        self.has_output = False
        self._job, self._to = job, to
        self._earlier_tokens = len(job.output)
        self._max_tokens = leg_wire.MAX_TOKENS
        if job.inputs is not None:
            self._max_tokens = 0
        elif job.max_tokens is not None:
            self._max_tokens = min(self._max_tokens, max(0, job.max_tokens - len(job.output)))
        self._asked = asked_text(job)
        self._began: leg_wire.LegStarted | None = None
        self._has_read = False
        self._proof: leg_wire.LegProof | None = None
        self._prompt = 0
        self._prompt_commitment = ""
        self._tokens = self._characters = self._logprobs = self._cached = self._shifted = 0
        self._bytes = 0  # of the text
        self._vectors: list[int] = []  # their lengths
        self._computed = False

    def begin(self, began: leg_wire.LegStarted) -> None:
        _expect(self._began is None)
        if began.digest != self._to.digest:
            raise ProtocolViolation("another file than requested")
        if not _samples_as_requested(began.sampling, self._job):
            raise ProtocolViolation("other sampling parameters than requested")
        if began.tool_style not in STYLES:
            raise ProtocolViolation("unknown format of tool calls")
        if (began.upstream is not UNSET) != self._to.of_upstream:
            raise ProtocolViolation("an upstream in the place of a box, or the other way round")
        versions = (UPSTREAM_VERSION,) if self._to.of_upstream else range(1, VERSION + 1)
        if began.proof not in versions:
            raise ProtocolViolation("a version of proofs that was not requested")
        if began.exactness is not UNSET and began.proof != VERSION:
            raise ProtocolViolation("an exactness in a version of proofs that has none")
        self._began, self.output = began, commitment.RunningCommitment(began.nonce, began.proof)

    def read(self, read: leg_wire.PromptRead) -> None:
        _expect(self._began is not None and not self._has_read)
        self._has_read = True
        job = self._job
        if self._to.of_upstream:
            if read.tokens:
                raise ProtocolViolation("tokens of an upstream's model")
            self._prompt_commitment, _ = commitment.commit(self._asked, None, job.nonce)
            return
        if (
            job.prompt_tokens is not None
            and job.inputs is None
            and read.tokens != job.prompt_tokens
        ):
            raise ProtocolViolation("other prompt tokens than requested")
        if not _may_have(self._asked + job.system, len(read.tokens)):
            raise ProtocolViolation("more prompt tokens than the prompt can have")
        self._prompt = len(read.tokens)
        self._prompt_commitment, _ = commitment.commit(self._asked, read.tokens, job.nonce)

    def keep_proof(self, proof: leg_wire.LegProof) -> None:
        """The proof comes before the last output, and is looked at with that."""
        _expect(self._has_read and self._proof is None)
        self._proof = proof

    def take(self, message: leg_wire.Outputs) -> None:
        _expect(self._has_read and bool(message.outputs))
        self.has_output = True
        if any(output.finish_reason is not None for output in message.outputs[:-1]):
            raise ProtocolViolation("output after the end")
        for output in message.outputs:
            records = logprob_records.records(self._job, output.logprobs, self._logprobs)
            self.output.add(output.text, output.tokens, records, output.vectors)
            self._tokens += len(output.tokens)
            self._characters += len(output.text)
            self._bytes += len(output.text.encode())
            self._cached = output.cached_tokens or self._cached
            self._shifted = output.shifted_tokens
            self._computed |= output.queue_ms is not None
            self._check_extras(output)
        all_tokens = self._earlier_tokens + self._tokens
        if self._tokens > (0 if self._to.of_upstream else self._max_tokens):
            raise ProtocolViolation("more tokens than requested")
        if self._to.of_upstream:
            all_tokens = self._max_tokens
        if self._characters > _MAX_TOKEN_CHARACTERS * all_tokens:
            raise ProtocolViolation("more text than the tokens can have")
        if self._cached > self._prompt or self._shifted > self._prompt + all_tokens:
            raise ProtocolViolation("more cached or shifted tokens than there are")

    def _check_extras(self, output: leg_wire.Out) -> None:
        job = self._job
        if output.stop_string is not None and output.stop_string not in job.stop:
            raise ProtocolViolation("a stop string that was not requested")
        self._logprobs += len(output.logprobs)
        # An earlier leg may have held some back, with their text.
        known = self._earlier_tokens + self._tokens + (self._prompt if job.echo else 0)
        if self._to.of_upstream:
            known = self._bytes + _UNSEEN_TOKENS
        if self._logprobs > (known if job.logprobs is not None else 0):
            raise ProtocolViolation("log-probabilities that were not requested")
        if not all(map(_is_logprob, output.logprobs)):
            raise ProtocolViolation("log-probabilities that are not finite")
        self._vectors += map(len, output.vectors)
        if len(self._vectors) > len(job.inputs or ()):
            raise ProtocolViolation("vectors that were not requested")
        if not all(map(_is_vector, output.vectors)):
            raise ProtocolViolation("malformed vectors")

    def end(self, message: leg_wire.Outputs) -> bool:
        """After the one with a finish reason: whether there is something to prove."""
        reason = message.outputs[-1].finish_reason
        reasons = _UPSTREAM_FINISH_REASONS if self._to.of_upstream else _FINISH_REASONS
        if reason not in reasons:
            raise ProtocolViolation("unknown finish reason")
        if reason == "cancelled":
            if not self.stopped:
                raise ProtocolViolation("cancelled without being asked to stop")
            if not self._computed:
                return False  # it only waited
        elif self._job.inputs is not None and (
            len(self._vectors) != len(self._job.inputs)
            or len(set(self._vectors)) != 1
            or not self._has_dimensions(self._vectors[0] // 4)
        ):
            raise ProtocolViolation("other vectors than requested")
        job = self._job
        text = mark_text(job.request_id, job.choice, job.leg, self._tokens, self.output.commitment)
        if not verify(self._to.node_id, MARK_DOMAIN, text, bytes.fromhex(message.mark)):
            raise ProtocolViolation("the mark does not match what was sent")
        return True

    def _has_dimensions(self, size: int) -> bool:
        """Boxes whose proofs are of version 1 leave it to the coordinator to shorten vectors."""
        dimensions = self._job.dimensions
        if dimensions is None or self.output.version == 1:
            return size >= (dimensions or 1)
        return size == dimensions

    @property
    def estimated_tokens(self) -> int:
        """About how many an upstream's answer has, by its text so far."""
        return estimate_tokens(self._bytes)

    def prove(self, reason: str) -> tuple[LegStatement, SignedProof]:
        """The proof, which says what has been seen, and not more than was offered."""
        if self._proof is None:
            raise ProtocolViolation("no proof")
        signed = SignedProof(self._proof.signed, self._proof.signature)
        try:  # as whoever verifies the receipt will
            proof = read_statement(signed)
            written = canonical(proof)
        except ValueError:
            raise ProtocolViolation("invalid proof, or not in canonical form") from None
        if written != signed.signed.encode():
            raise ProtocolViolation("the proof is not in canonical form")
        if isinstance(proof, Proof) == self._to.of_upstream:
            raise ProtocolViolation("a proof of another kind")
        expected = self._expected(reason)
        if isinstance(proof, UpstreamLeg):
            expected |= self._check_upstream(proof)
        else:
            expected |= self._expected_of_box()
        for field, value in expected.items():
            if getattr(proof, field) != value:
                raise ProtocolViolation(f"another {field} in the proof")
        if isinstance(proof, Proof) and not proof.is_known:
            raise ProtocolViolation("a proof without the fields of its version")
        self._check_price(proof)
        if not is_signed(proof, signed):
            raise ProtocolViolation("invalid signature of the proof")
        return proof, signed

    def _expected(self, reason: str) -> dict[str, object]:
        job, began = self._job, self._began
        assert began is not None  # it has sent outputs
        return {
            "v": began.proof if began.exactness is UNSET else EXACT_VERSION,
            "request_id": job.request_id,
            "leg": job.leg,
            "choice": job.choice,
            "prompt": job.prompt_number,
            "node_id": self._to.node_id,
            "model": job.model.id,
            "prompt_commitment": self._prompt_commitment,
            "output_commitment": self.output.commitment,
            "finish_reason": reason,
        }

    def _expected_of_box(self) -> dict[str, object]:
        began = self._began
        assert began is not None
        return {
            "model_digest": self._to.digest,
            "engine": EngineBuild(began.build, began.device),
            "exactness": began.exactness,
            "sampling": sampling_record(began.sampling, self._job.max_tokens),
            "prompt_tokens": self._prompt,
            "completion_tokens": self._tokens,
            "cached_tokens": self._cached,
            "shifted_tokens": self._shifted,
            "witness": None,
            "mark": None,
        }

    def _check_upstream(self, leg: UpstreamLeg) -> dict[str, object]:
        """Which upstream it must name; its tokens are within bounds, and its parameters the
        request's."""
        began, job = self._began, self._job
        assert began is not None and began.upstream is not UNSET
        prompt, completion = most_of_upstream(job, self._bytes)
        if leg.prompt_tokens > prompt or leg.completion_tokens > completion:
            raise ProtocolViolation("more tokens of an upstream than the texts can have")
        if leg.cached_tokens > leg.prompt_tokens:
            raise ProtocolViolation("more cached tokens than there are")
        asked = sent_of(job, openai_only=False)
        if any(name in asked and asked[name] != value for name, value in leg.sampling.items()):
            raise ProtocolViolation("other sampling parameters than requested")
        return {"upstream": began.upstream.name, "upstream_model": began.upstream.model}

    def _check_price(self, proof: LegStatement) -> None:
        price = proof.price
        try:
            prices = [amount.per_token(p) for p in (price.prompt, price.cached, price.completion)]
            offered = [amount.per_token(p) for p in self._to.prices]
        except ValueError as error:
            raise ProtocolViolation(f"a price in the proof is {error}") from None
        if price.currency != self._to.currency or any(
            a > o for a, o in zip(prices, offered, strict=True)
        ):
            raise ProtocolViolation("a higher price than offered")


def _expect(expected: bool) -> None:
    if not expected:
        raise ProtocolViolation("unexpected message")


def may_answer(answer: leg_wire.Tokens, job: Job, tokens: list[int] | None) -> bool:
    """Whether that may be the answer to a request for a prompt's tokens, or for the text of
    `tokens`."""
    if tokens is not None:
        return len(answer.text) <= _MAX_TOKEN_CHARACTERS * len(tokens)
    return answer.context > 0 and _may_have(asked_text(job) + job.system, len(answer.tokens))


def most_of_upstream(job: Job, size: int) -> tuple[int, int]:
    """How many tokens of the prompt and of an answer with so many bytes of text an upstream's leg
    may be billed: the box that serves it claims no more, and the one that asked for it accepts no
    more.  Twice what is estimated, as some languages have more tokens, and what nobody sees."""
    system = estimate_tokens(len(job.system.encode()))
    prompt = 2 * (estimate_prompt(job) + system) + _UNSEEN_PROMPT_TOKENS
    if job.inputs is not None:
        return prompt, 0
    completion = 2 * estimate_tokens(size) + _UNSEEN_TOKENS
    return prompt, completion if job.max_tokens is None else min(completion, job.max_tokens)


def _may_have(text: str, tokens: int) -> bool:
    return tokens <= _TEMPLATE_TOKENS + _REPEATS * len(text.encode())


def _is_logprob(token: TokenLogprob) -> bool:
    return all(map(math.isfinite, (token.logprob, *(value for _, value in token.top))))


def _is_vector(data: bytes) -> bool:
    """Little-endian float32, all of them finite."""
    return len(data) % 4 == 0 and math.isfinite(sum(array("f", data)))


def _samples_as_requested(sampling: Sampling, job: Job) -> bool:
    """Whether seed and penalties are the request's; what it does not say the peer chooses, within
    bounds, so that others can go on with it."""
    if job.drawn_with is not None:
        return sampling == job.drawn_with
    return sampling.follows(job.sampling)
