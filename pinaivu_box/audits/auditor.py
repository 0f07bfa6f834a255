"""Audits the legs of a request: what was signed is computed again and compared.

The transcript is checked against the commitments first, so what is computed is what was signed.
Each choice is computed as one sequence, whatever legs it had: positions count on, and its
randomness with them.  Several legs may have made it, of which only some are to be audited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box.audits.contexts import context_of, may_shift
from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.audits.replay import TENANT, Recomputed, compute_again
from pinaivu_box.engine.messages import Add, Sampling
from pinaivu_box.errors import ApiError, ContextOverflow, EngineLost
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.receipts.audit import LegAudit, judge, not_auditable
from pinaivu_box.receipts.receipt import Proof
from pinaivu_box.receipts.transcript import (
    PromptTranscript,
    RequestTranscript,
    miscount,
    mismatch,
)


async def audit_legs(
    engine: EngineProcess, transcript: RequestTranscript, legs: Sequence[LegToAudit]
) -> list[LegAudit]:
    """The legs in their order.  Of those whose transcript or model is another one, the audit says
    so.  Raises EngineLost."""
    audits: list[LegAudit] = []
    replays: dict[int, Recomputed | str] = {}  # by choice; or why there is none
    for leg in legs:
        proof = leg.proof
        why = _unsuitable(engine, transcript, leg)
        if not why and (wrong := _impossible(engine, transcript, proof)):
            audits.append(LegAudit(proof.choice, proof.leg, proof.node_id, "differs", wrong))
            continue
        if not why and proof.choice not in replays:
            replays[proof.choice] = await _replay(engine, transcript, proof)
        replay = why or replays[proof.choice]
        if isinstance(replay, str):
            audits.append(not_auditable(proof, replay))
        else:
            shift = _wrong_shift(transcript, proof, engine.ready.context, replay)
            audits.append(shift or _judged(transcript, proof, replay))
    return audits


def _unsuitable(engine: EngineProcess, transcript: RequestTranscript, leg: LegToAudit) -> str:
    """Why the leg cannot be audited; empty if it can."""
    proof = leg.proof
    if proof.model_digest != engine.model_digest:
        return f"there is no model with the digest {proof.model_digest} here"
    if why := mismatch(transcript, proof, leg.prompt, leg.output):
        return f"the transcript does not belong to it: {why}"
    made = [each.leg for each in transcript.legs if each.choice == proof.choice]
    if made[: proof.leg + 1] != [*range(proof.leg + 1)]:
        return "the transcript has not all legs before it"
    try:
        asked = _asked(transcript, proof)
    except msgspec.DecodeError:
        return "what was asked is no JSON, as it is committed to"
    tools, constraint = transcript.tools, transcript.constraint
    if (tools.functions if tools else None) != asked.get("tools"):
        return "the transcript's tools are not those that were asked with"
    if (constraint.text if constraint else None) != asked.get("constraint"):
        return "the transcript's constraint is not the one that was asked with"
    return ""


def _impossible(engine: EngineProcess, transcript: RequestTranscript, proof: Proof) -> str:
    """What no engine with the model's file makes, whatever else it computes; empty if nothing is.
    It is not computed again, so it must not pass for what cannot be audited."""
    prompt, made = transcript.prompt(proof.prompt), transcript.leg(proof.choice, proof.leg)
    assert prompt is not None and made is not None  # as `mismatch` has found
    if not prompt.tokens:
        return "its prompt has no tokens"
    known = engine.ready.vocabulary
    for name, tokens in (("prompt", prompt.tokens), ("output", made.tokens)):
        if known and max(tokens, default=0) >= known:
            return f"its {name} has token {max(tokens)}, and the model has tokens 0 to {known - 1}"
    return miscount(transcript, proof)


async def _replay(
    engine: EngineProcess, transcript: RequestTranscript, proof: Proof
) -> Recomputed | str:
    tokens = _tokens(transcript, proof)
    try:
        return await compute_again(engine, request_of(transcript, proof), tokens)
    except EngineLost:
        raise
    except ContextOverflow:
        return (
            f"it takes a context of {proof.prompt_tokens + len(tokens)} tokens or more, and the "
            f"engine here has {engine.ready.context}"
        )
    except (ApiError, msgspec.ValidationError) as error:
        return f"the engine cannot compute it again: {error}"


def request_of(transcript: RequestTranscript, proof: Proof) -> Add:
    """What an engine gets to compute the proof's choice.  Raises msgspec.ValidationError if its
    sampling parameters are none."""
    prompt = transcript.prompt(proof.prompt)
    assert prompt is not None  # as `mismatch` has found
    asked = _asked(transcript, proof)
    return Add(
        id=proof.request_id,
        messages=[],
        sampling=sampling_of(proof),
        max_tokens=None,
        stop=msgspec.convert(asked.get("stop", []), list[str]),
        tenant=TENANT,
        tools=transcript.tools,
        constraint=transcript.constraint,
        **_prompt(prompt, asked),
    )


def _prompt(prompt: PromptTranscript, asked: dict[str, Any]) -> dict[str, Any]:
    """A prompt of token ids may end in the middle of a character, which the text goes on with."""
    first = asked.get("prompt")
    if isinstance(first, list) and first and isinstance(first[0], list):
        return {"prompt": prompt.tokens}
    return {"read": prompt.tokens, "thinking": prompt.thinking}


def sampling_of(proof: Proof) -> Sampling:
    """The parameters of a proof, as an engine draws with them.  Raises msgspec.ValidationError."""
    values = {**proof.sampling, "seed": _integer(proof.sampling.get("seed"))}
    values.pop("max_tokens", None)
    return msgspec.convert(values, Sampling)


def _integer(text: object) -> int:
    try:
        return int(str(text))
    except ValueError:
        raise msgspec.ValidationError("the seed is no number") from None


def _asked(transcript: RequestTranscript, proof: Proof) -> dict[str, Any]:
    """What was asked, as it was committed to."""
    prompt = transcript.prompt(proof.prompt)
    assert prompt is not None
    asked: dict[str, Any] = msgspec.json.decode(prompt.asked, type=dict[str, Any])
    return asked


def _wrong_shift(
    transcript: RequestTranscript, proof: Proof, context: int, replay: Recomputed
) -> LegAudit | None:
    """If the context was shifted otherwise the numbers are others; and if none shifts so, the proof
    is wrong."""
    legs = [leg for leg in transcript.legs if leg.choice == proof.choice][: proof.leg + 1]
    made = sum(len(leg.tokens) for leg in legs)
    prompt, shifted = proof.prompt_tokens, proof.shifted_tokens
    if not shifted and not replay.shifted_tokens:
        return None
    if shifted and context_of(prompt, made, shifted, context) is None:
        why = f"no context forgets {shifted} tokens after {prompt} of a prompt and {made} more"
        return LegAudit(proof.choice, proof.leg, proof.node_id, "differs", why)
    if may_shift(context, prompt, made, shifted):
        return None
    why = f"its context shifted by {shifted} tokens: it needs one of the same size"
    return not_auditable(proof, f"{why}, and the engine here has {context}")


def _judged(transcript: RequestTranscript, proof: Proof, replay: Recomputed) -> LegAudit:
    before = [each for each in transcript.legs if each.choice == proof.choice][: proof.leg]
    start = sum(len(each.tokens) for each in before)
    if proof.completion_tokens and before and len(replay.tokens) <= start:
        return not_auditable(proof, "the answer had ended in a leg before it")
    is_last = _is_last(transcript, proof)
    audit = judge(proof, replay.answer, start, is_last=is_last)
    earlier = "".join(each.text for each in before)
    made = transcript.leg(proof.choice, proof.leg)
    if (
        audit.verdict == "agrees"
        and made is not None
        and not _is_text(replay.text, earlier, made.text, is_last=is_last)
    ):
        why = "the draws agree, but the text that it committed to is not that of its tokens"
        return msgspec.structs.replace(audit, verdict="differs", meaning=why)
    return audit


def _is_text(whole: str, earlier: str, own: str, *, is_last: bool) -> bool:
    """Whether a leg's own text is that of its tokens, or nobody knows, since the text before it is
    another one.  Text that may begin a stop string is in the leg after it."""
    if not whole.startswith(earlier):
        return True
    return whole == earlier + own if is_last else whole.startswith(earlier + own)


def _tokens(transcript: RequestTranscript, proof: Proof) -> list[int]:
    """Of all legs of the proof's choice."""
    legs = (each.tokens for each in transcript.legs if each.choice == proof.choice)
    return [token for tokens in legs for token in tokens]


def _is_last(transcript: RequestTranscript, proof: Proof) -> bool:
    return max(each.leg for each in transcript.legs if each.choice == proof.choice) == proof.leg
