"""Answers of the fake model to one prompt, as transcripts and as legs that a box has signed."""

from __future__ import annotations

from typing import Any

from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.commitment import Extras
from pinaivu_box.receipts.receipt import SignedProof, sampling_record
from pinaivu_box.receipts.transcript import LegTranscript, PromptTranscript, RequestTranscript
from tests.support import receipt_vectors
from tests.support.fake_model import fake_text

NONCE = "ab" * 32
PROMPT = [*b"Hello, box"]
REQUEST = "req_01m8jw26mke71a7sxaax08p8mq"


def said(length: int = 30, prompt: int = len(PROMPT)) -> list[int]:
    """The first tokens of the answer to a prompt of so many tokens."""
    return [*fake_text(prompt, length).encode()]


def transcript(
    *legs: list[int],
    asked: dict[str, Any] | None = None,
    prompt: list[int] = PROMPT,
    **more: Any,
) -> RequestTranscript:
    """Of one choice; `prompt` are the tokens that its box says it was given."""
    text = commitment.prompt_text([], [], prompt=["Hello, box"], **(asked or {}))
    made_legs = [
        LegTranscript(0, number, tokens, bytes(t for t in tokens if t < 256).decode())
        for number, tokens in enumerate(legs)
    ]
    prompts = [PromptTranscript(0, text, prompt)]
    return RequestTranscript(REQUEST, receipt_vectors.MODEL, prompts, made_legs, **more)


def leg_of(kept: RequestTranscript, number: int = 0, **more: Any) -> LegToAudit:
    """Leg `number` in the list, as its box has signed it."""
    made_leg, prompt = kept.legs[number], kept.prompts[0]
    asked, opened = commitment.commit(prompt.asked, prompt.tokens, NONCE)
    output, opening = commitment.commit(made_leg.text, made_leg.tokens, NONCE, [Extras()])
    proof = receipt_vectors.proof(
        **{
            "leg": made_leg.leg, "choice": made_leg.choice, "prompt_commitment": asked,
            "output_commitment": output, "sampling": sampling_record(Sampling(temperature=0.0), 30),
            "completion_tokens": len(made_leg.tokens), "prompt_tokens": len(prompt.tokens),
            "finish_reason": "length", **more,
        }
    )  # fmt: skip
    return LegToAudit(proof, SignedProof("", ""), opened, opening)
