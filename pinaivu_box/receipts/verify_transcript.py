"""Whether a receipt is about the exchange that its owner kept: the commitments, recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Struct

from pinaivu_box.receipts import answer, commitment, given_transcript
from pinaivu_box.receipts.checks import VerificationCheck, either, matches
from pinaivu_box.receipts.commitment import Opening
from pinaivu_box.receipts.receipt import (
    UPSTREAM_VERSION,
    LegStatement,
    Proof,
    Receipt,
    ReceiptView,
)
from pinaivu_box.receipts.transcript import CommittedTranscript, miscount, mismatch, openings_of


class Transcript(Struct, frozen=True):
    """What the owner may add, to check that the receipt is about this very exchange.

    `prompts` are what was asked (see `commitment.prompt_text`), and `answer` is the text of the
    answer or its JSON body (see `answer.read`).  The text of each choice begins with the one in
    `echoed`, which is not the model's.  `recorded` is what a box keeps of it, with the tokens (see
    `given_transcript.read`), and `secret` the API key that opens it if it is sealed.
    """

    prompts: list[str] | None = None
    echoed: list[str] = []
    answer: bytes | None = None
    recorded: bytes | None = None
    secret: str | None = None


def usual_stop(document: bytes) -> list[str]:
    """The stop strings of a receipt's model, which count where the request has none."""
    try:
        opening = msgspec.json.decode(document, type=ReceiptView).opening or {}
        return msgspec.convert(opening.get("stop") or [], list[str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []  # `verify_receipt` says what is wrong


def transcript_checks(
    view: ReceiptView, receipt: Receipt, proofs: Sequence[LegStatement], transcript: Transcript
) -> Iterator[VerificationCheck]:
    """`proofs`: those of the receipt, all of them, or none if one of them is wrong."""
    if transcript.prompts is not None:
        yield _prompts(view, receipt, transcript.prompts)
    if transcript.answer is not None:
        yield from _answer(view, receipt, transcript.answer, transcript.echoed)
    if transcript.recorded is not None:
        yield from _recorded(view, receipt, proofs, transcript.recorded, transcript.secret)


def _recorded(
    view: ReceiptView,
    receipt: Receipt,
    proofs: Sequence[LegStatement],
    document: bytes,
    secret: str | None,
) -> Iterator[VerificationCheck]:
    """The transcript as a whole, then text and tokens of each leg."""
    try:
        recorded = given_transcript.read(document, secret)
        why = _not_of(recorded, receipt, proofs)
        openings = openings_of(view.opening or {}, proofs) if not why else []
    except given_transcript.NotATranscript as error:
        why = str(error)
    except ValueError as error:
        why = f"{error}: ask the key's owner"
    holds = "it is that of this request, and has nothing of which the receipt has no proof"
    yield either("transcript", not why, holds, why)
    if why:
        return
    for number, (proof, pair) in enumerate(zip(proofs, openings, strict=True)):
        yield _leg(number, recorded, proof, *pair)


def _not_of(recorded: CommittedTranscript, receipt: Receipt, proofs: Sequence[LegStatement]) -> str:
    """Why the transcript is not the receipt's; empty if it may be."""
    for field in ("request_id", "model"):
        if (value := getattr(recorded, field)) != getattr(receipt, field):
            return f"it is about another {field}: {value}"
    if not proofs:
        return "without the receipt's proofs nothing can be compared with it"
    prompts = [each.prompt for each in recorded.prompts]
    legs = [(each.choice, each.leg) for each in recorded.legs]
    if len({*prompts}) < len(prompts) or len({*legs}) < len(legs):
        return "it has a prompt or a leg twice"
    made = [proof for proof in proofs if isinstance(proof, Proof)]
    if {*prompts} - {proof.prompt for proof in made} or {*legs} - {
        (proof.choice, proof.leg) for proof in made
    }:
        return "it has a prompt or a leg of which the receipt has no proof"
    return ""


def _leg(
    number: int,
    recorded: CommittedTranscript,
    proof: LegStatement,
    prompt: Opening,
    output: Opening,
) -> VerificationCheck:
    why = mismatch(recorded, proof, prompt, output)
    fails = f"the transcript is another: {why}"
    if not why and isinstance(proof, Proof) and (why := miscount(recorded, proof)):
        fails = f"the proof is wrong: {why}"
    holds = f"its prompt and output are what {proof.node_id} committed to, token by token"
    return either(f"transcript {number}", not why, holds, fails)


def _prompts(view: ReceiptView, receipt: Receipt, prompts: list[str]) -> VerificationCheck:
    opening = view.opening or {}
    try:
        values = opening["prompts"] if "prompts" in opening else [opening["prompt"]]
        pairs = zip(prompts, msgspec.convert(values, list[Opening]), strict=True)
        commitments = [
            commitment.recompute(prompt, prompt_opening) for prompt, prompt_opening in pairs
        ]
        ok = commitment.of_several(commitments) == receipt.prompt_commitment
    except (KeyError, TypeError, ValueError):
        meaning = "the receipt has no opening for its prompt: ask the key's owner"
        return VerificationCheck("prompt commitment", False, meaning)
    return matches("prompt", ok, "the prompt you gave is")


def _opening(view: ReceiptView, receipt: Receipt) -> Opening | None:
    """The output's opening, if it is of the receipt's version."""
    try:
        opening = msgspec.convert((view.opening or {})["output"], Opening)
    except (KeyError, ValueError):
        return None
    has_tokens = bool(opening.tokens_sha256) == (receipt.v != UPSTREAM_VERSION)
    parts = (opening.text_sha256, opening.logprobs_sha256, opening.vectors_sha256)
    whole = all(parts) if receipt.v > 1 else not any(parts)
    return opening if whole and has_tokens else None


def _answer(
    view: ReceiptView, receipt: Receipt, data: bytes, echoed: list[str]
) -> Iterator[VerificationCheck]:
    """Everything that the answer holds: text, log-probabilities, vectors."""
    opening = _opening(view, receipt)
    if opening is None:
        meaning = "the receipt has no opening for its output: ask the key's owner"
        yield VerificationCheck("output commitment", False, meaning)
        return
    vectors = opening.vectors_sha256 not in ("", answer.NO_VECTORS)
    try:
        received = answer.read(data, vectors=vectors, echoed=echoed)
    except answer.NoAnswer as error:
        yield VerificationCheck("answer", False, f"the answer {error}")
        return
    if received.request_id is not None:
        meaning = f"the answer is that of {received.request_id}"
        same = received.request_id == receipt.request_id
        yield either("answer", same, meaning, f"{meaning}, not {receipt.request_id}")
    if received.text is not None:
        ok = commitment.recompute(received.text, opening) == receipt.output_commitment
        yield matches("output", ok, "the output you gave is")
    elif received.vectors is None:
        meaning = (
            "the answer has calls or thoughts, and the model's own text, which is committed to, "
            "cannot be had from them"
        )
        yield VerificationCheck("output commitment", False, meaning)
    if receipt.v == 1:
        if received.vectors is not None or received.has_logprobs:
            meaning = (
                "a receipt of version 1 commits to text and tokens only, and nothing in it says "
                "whether the answer's log-probabilities or vectors are the ones that were sent"
            )
            yield VerificationCheck("answer", False, meaning)
        return
    bound = commitment.reopen(opening) == receipt.output_commitment
    if received.logprobs is not None:
        ok = bound and received.logprobs == opening.logprobs_sha256
        yield matches("log-probabilities", ok, "the log-probabilities of the answer are")
    if received.vectors is not None:
        ok = bound and received.vectors == opening.vectors_sha256
        yield matches("vectors", ok, "the vectors of the answer are")
