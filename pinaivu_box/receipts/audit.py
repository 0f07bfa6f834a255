"""Judges an answer that was computed again: whether it is what the proofs of its legs say.

Pure.  Where a leg's proof promises the same bits, and the engine that computed it again has the
same exactness, every draw and the digest of the numbers have to agree (`bitwise`): one that does
not is proof against the node.  Elsewhere numbers are rounded differently, so honest answers differ
here and there, hardly ever by much; `statistical` asks how likely so many differences, and so large
ones, would be of an honest node (`divergence`; Karvonen et al., "Token-DiFR", 2025).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct

from pinaivu_box.engine.messages import ReplayedToken
from pinaivu_box.receipts.divergence import FALSE_ALARM_RATE, Divergence
from pinaivu_box.receipts.receipt import Proof

Mode = Literal["bitwise", "statistical"]
Verdict = Literal["agrees", "differs", "not auditable"]
_NUMBER = struct.Struct("<If")


class ReplayedAnswer(Struct, frozen=True):
    """What came of computing a choice again: its `tokens` as far as they were compared, why it
    ended there ("length" if with the last recorded token), and the engine's `exactness`."""

    tokens: Sequence[ReplayedToken]
    finish_reason: str
    exactness: str


class DrawDifference(Struct, frozen=True):
    """A token that was not drawn.  `index` counts the output's tokens, `position` the prompt's too
    and keys, with the `seed`, the randomness.  Logits are the model's own; `margin` is as in
    `ReplayedToken`, None if nothing could have made the recorded token the draw."""

    index: int
    position: int
    seed: str
    recorded: int
    drawn: int
    logit: float
    drawn_logit: float
    margin: float | None
    possible: bool


class LegAudit(Struct, frozen=True, omit_defaults=True):
    """What is known of one leg.  `numbers` says whether the digest of its numbers agrees, None if
    it need not.  `p_value` is how likely differences like these are of an honest node."""

    choice: int
    leg: int
    node_id: str
    verdict: Verdict
    meaning: str
    mode: Mode | None = None
    tokens: int = 0
    compared: int = 0
    agreeing: int = 0
    numbers: bool | None = None
    first: DrawDifference | None = None
    margins: list[float] = []
    p_value: float | None = None
    false_alarm_rate: float | None = None


def judge(proof: Proof, answer: ReplayedAnswer, start: int, *, is_last: bool) -> LegAudit:
    """A leg that begins with token number `start` of its choice, and is the last of it or not."""
    end = start + proof.completion_tokens
    fault = _wrong_end(proof, answer, end, is_last=is_last)
    return _judge(proof, answer.tokens[start:end], start, fault, answer.exactness)


def not_auditable(proof: Proof, why: str) -> LegAudit:
    """A leg of which nothing can be said."""
    return LegAudit(proof.choice, proof.leg, proof.node_id, "not auditable", why)


def without_tokens(audit: LegAudit) -> LegAudit:
    """What is kept of it for good: where the answer differs, and none of its tokens, which go with
    the transcript.  Whoever has that computes them again."""
    if audit.first is None:
        return audit
    why = (
        f"another token was drawn at position {audit.first.position} (token "
        f"{audit.first.index + 1} of the answer)"
    )
    return msgspec.structs.replace(audit, meaning=why, first=None, margins=[])


def verdict_of(audits: Sequence[LegAudit]) -> Verdict:
    """Of all legs together: one that differs counts most, then one that cannot be audited."""
    verdicts = {audit.verdict for audit in audits}
    for verdict in ("differs", "not auditable"):
        if verdict in verdicts:
            return verdict
    return "agrees" if verdicts else "not auditable"


def _judge(
    proof: Proof, tokens: Sequence[ReplayedToken], start: int, fault: str, exactness: str
) -> LegAudit:
    differing = [number for number, token in enumerate(tokens) if token.drawn != token.recorded]
    mode: Mode = "bitwise" if exactness and proof.exact_on == exactness else "statistical"
    numbers = _same_numbers(proof, tokens) if mode == "bitwise" else None
    divergence = Divergence.of(tokens) if mode == "statistical" else None
    first = _difference(proof, tokens, start, differing[0]) if differing else None
    if mode == "bitwise":
        why = fault or _bitwise_fault(first, numbers, len(tokens))
        meaning = why or f"every draw and the numbers agree, to the bit ({proof.exact_on})"
    else:
        assert divergence is not None
        why = fault or divergence.fault
        meaning = why or divergence.meaning
    return LegAudit(
        proof.choice,
        proof.leg,
        proof.node_id,
        "differs" if why else "agrees",
        meaning,
        mode,
        proof.completion_tokens,
        len(tokens),
        len(tokens) - len(differing),
        numbers,
        first,
        sorted(tokens[n].margin for n in differing if math.isfinite(tokens[n].margin))[::-1],
        None if divergence is None else divergence.p_value,
        None if divergence is None else FALSE_ALARM_RATE,
    )


def _same_numbers(proof: Proof, tokens: Sequence[ReplayedToken]) -> bool:
    return proof.logits_sha256 is not UNSET and digest_of(tokens) == proof.logits_sha256


def digest_of(tokens: Sequence[ReplayedToken]) -> str:
    """What `logits_sha256` is of these numbers."""
    parts = (_NUMBER.pack(token.recorded, token.logit) for token in tokens)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _bitwise_fault(first: DrawDifference | None, numbers: bool | None, compared: int) -> str:
    if first is not None:
        return f"another token was drawn: {describe(first)}"
    if not numbers:
        return (
            f"the draws agree, but the numbers do not: the tokens' logits, computed again at all "
            f"{compared} positions, are not those that the proof commits to"
        )
    return ""


def describe(first: DrawDifference) -> str:
    """Where and how a draw differs, as a clause."""
    margin = "" if first.margin is None else f", ahead by {first.margin:.4g} with its noise"
    possible = "" if first.possible else "; the recorded one cannot be drawn there"
    return (
        f"at position {first.position} (token {first.index + 1} of the answer, seed {first.seed}) "
        f"token {first.recorded} (logit {first.logit!r}) is recorded, and token {first.drawn} "
        f"(logit {first.drawn_logit!r}) is the draw{margin}{possible}"
    )


def _difference(
    proof: Proof, tokens: Sequence[ReplayedToken], start: int, number: int
) -> DrawDifference:
    token, index = tokens[number], start + number
    return DrawDifference(
        index,
        proof.prompt_tokens + index,
        str(proof.sampling.get("seed", "")),
        token.recorded,
        token.drawn,
        token.logit,
        token.drawn_logit,
        token.margin if math.isfinite(token.margin) else None,
        token.possible,
    )


def _wrong_end(proof: Proof, answer: ReplayedAnswer, end: int, *, is_last: bool) -> str:
    """What is wrong with where the leg ends, which follows from its tokens alone; empty if nothing
    is."""
    compared = len(answer.tokens)
    if compared < end:
        last = answer.tokens[-1] if answer.tokens else None
        if last is not None and not last.possible and last.margin == math.inf:
            return f"token {compared} of the answer is one that is not allowed there"
        return f"the answer ends with its token {compared}, and the proof has {end - compared} more"
    reason, ended = proof.finish_reason, answer.finish_reason
    if not is_last or reason not in ("stop", "length") or reason == ended:
        return ""
    return f"it says that it ended by '{reason}', and by its tokens it is '{ended}'"
