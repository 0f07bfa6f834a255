"""Transcripts: what an auditor needs of a request beside its receipt.  Pure.

A transcript has what the receipt commits to: of each prompt its text and tokens, of each leg its
tokens and text.  Beside these is what decided the draws and is in no proof: which of the tools
could be called, the output's constraint, and what the template was given.  The signatures are the
receipt's; a transcript has none, and is worth what `mismatch` finds: nothing unless it opens
the receipt's commitments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.engine.messages import Constraint, Tools
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.commitment import Opening
from pinaivu_box.receipts.receipt import LegStatement, Name, Proof, RequestId

Token = Annotated[int, Meta(ge=0, lt=2**32)]


class PromptTranscript(Struct, frozen=True, forbid_unknown_fields=True):
    """Prompt number `prompt`: `asked` is its text as it is committed to (`commitment.prompt_text`),
    `tokens` what the model was given.  `thinking`: they end in the model's thoughts."""

    prompt: int
    asked: str
    tokens: list[Token]
    thinking: bool = False


class LegTranscript(Struct, frozen=True, forbid_unknown_fields=True):
    """What one leg of a choice has made."""

    choice: int
    leg: int
    tokens: list[Token]
    text: str


class CommittedTranscript(Struct, frozen=True, forbid_unknown_fields=True):
    """Of one request, as a verifier of its receipt reads it: `prompts` and `legs` are what the
    proofs commit to.  Nothing commits to the form of the rest."""

    request_id: RequestId
    model: Name
    prompts: list[PromptTranscript]
    legs: list[LegTranscript]
    tools: dict[str, Any] | None = None
    constraint: dict[str, Any] | None = None
    template: dict[str, Any] = {}
    system: str = ""
    v: Literal[1] = 1

    def prompt(self, number: int) -> PromptTranscript | None:
        return next((each for each in self.prompts if each.prompt == number), None)

    def leg(self, choice: int, leg: int) -> LegTranscript | None:
        return next((one for one in self.legs if (one.choice, one.leg) == (choice, leg)), None)


class RequestTranscript(CommittedTranscript, frozen=True, forbid_unknown_fields=True):
    """Of one request, as an audit takes it.  `tools` and `constraint` are as an engine got them,
    `template` are the variables of the template beside the messages, and `system` is the model's
    own system prompt, if it was put before the chat."""

    tools: Tools | None = None  # type: ignore[assignment]
    constraint: Constraint | None = None  # type: ignore[assignment]


_decoder = msgspec.json.Decoder(RequestTranscript)


def encode(transcript: RequestTranscript) -> bytes:
    return msgspec.json.encode(transcript)


def decode(data: bytes) -> RequestTranscript:
    """Raises ValueError."""
    try:
        return _decoder.decode(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def mismatch(
    transcript: CommittedTranscript,
    statement: LegStatement,
    prompt: Opening,
    output: Opening,
) -> str:
    """Why what a transcript has of a leg is not what its signed statement commits to, as the end of
    a sentence; "" if it is.  `prompt` and `output` are the openings of its commitments."""
    if transcript.request_id != statement.request_id:
        return f"it is that of {transcript.request_id}"
    if not isinstance(statement, Proof):
        return "an upstream made the leg, of which no tokens are known"
    asked = transcript.prompt(statement.prompt)
    made = transcript.leg(statement.choice, statement.leg)
    if asked is None or made is None:
        return "it does not have the prompt, or the leg"
    if not _opens(asked.asked, asked.tokens, prompt, 1, statement.prompt_commitment):
        return "its prompt is not what was committed to"
    if not _opens(made.text, made.tokens, output, statement.v, statement.output_commitment):
        return "its output is not what was committed to"
    return ""


def miscount(transcript: CommittedTranscript, proof: Proof) -> str:
    """What is wrong with the tokens that a proof counts, as the end of a sentence; "" if they are
    as many as it commits to.  The transcript is the one of the commitments (`mismatch`)."""
    asked = transcript.prompt(proof.prompt)
    made = transcript.leg(proof.choice, proof.leg)
    assert asked is not None and made is not None
    for what, counted, tokens in (
        ("prompt", proof.prompt_tokens, asked.tokens),
        ("completion", proof.completion_tokens, made.tokens),
    ):
        if counted != len(tokens):
            return f"it counts {counted} {what} tokens, and commits to {len(tokens)}"
    return ""


def _opens(
    text: str, tokens: Sequence[int], opening: Opening, version: int, committed: str
) -> bool:
    """Whether the opening is one of that version, of this text and these tokens, and leads to the
    commitment."""
    text_digest = hashlib.sha256(text.encode()).hexdigest()
    parts = (opening.text_sha256, opening.logprobs_sha256, opening.vectors_sha256)
    whole = opening.text_sha256 == text_digest and all(parts) if version > 1 else not any(parts)
    is_of_tokens = opening.tokens_sha256 == commitment.tokens_sha256(tokens)
    return whole and is_of_tokens and commitment.recompute(text, opening) == committed


def openings_of(
    opening: Mapping[str, Any], statements: Sequence[LegStatement]
) -> list[tuple[Opening, Opening]]:
    """The openings of each leg's prompt and output, in the order of the receipt's `statements`, out
    of what a receipt's owner gets.  Raises ValueError."""
    try:
        prompts = opening["prompts"] if "prompts" in opening else [opening["prompt"]]
        legs = msgspec.convert(opening["legs"], list[Opening])
        by_number = dict(enumerate(msgspec.convert(prompts, list[Opening])))
        pairs = zip(statements, legs, strict=True)
        return [(by_number[one.prompt], leg) for one, leg in pairs]
    except (KeyError, ValueError) as error:
        raise ValueError("the receipt has no openings for its legs") from error
