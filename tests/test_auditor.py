"""The audit of legs by an engine process: which can be audited, and what is said of each."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from pinaivu_box.audits.auditor import audit_legs
from pinaivu_box.audits.contexts import context_of, may_shift, shifted_with
from pinaivu_box.engine.messages import Constraint, LoadModel, ReplayedToken, Sampling, Tools
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.receipts.audit import (
    ReplayedAnswer,
    digest_of,
    judge,
    verdict_of,
    without_tokens,
)
from pinaivu_box.receipts.divergence import (
    FALSE_ALARM_RATE,
    HONEST_LARGE_RATE,
    HONEST_RATE,
    Divergence,
    binomial_tail,
)
from pinaivu_box.receipts.receipt import Proof, sampling_record
from pinaivu_box.receipts.transcript import RequestTranscript
from tests.support import receipt_vectors
from tests.support.bare_engine import engine
from tests.support.engine_harness import Heard, add, run
from tests.support.exact_runner import made
from tests.support.fake_answers import PROMPT, leg_of, said, transcript

Change = dict[str, Any]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def fake() -> AsyncIterator[EngineProcess]:
    async with engine(LoadModel("fake:0", 0, 200, 2000, 4, 64, 1)) as process:
        process.model_digest = receipt_vectors.DIGEST
        yield process


@pytest.mark.anyio
async def test_legs_of_one_choice_are_computed_as_one(fake: EngineProcess) -> None:
    tokens = said()
    kept = transcript(tokens[:12], tokens[12:])
    legs = [leg_of(kept, finish_reason="peer_lost"), leg_of(kept, 1)]
    first, second = await audit_legs(fake, kept, legs)
    assert (first.verdict, first.compared, second.verdict, second.compared) == (
        "agrees", 12, "agrees", 18,
    )  # fmt: skip
    (alone,) = await audit_legs(fake, kept, legs[1:])
    assert alone == second


@pytest.mark.anyio
async def test_only_the_leg_that_lies_differs(fake: EngineProcess) -> None:
    tokens = said()
    tokens[20:] = [*b"something e"][:10]
    kept = transcript(tokens[:12], tokens[12:])
    legs = [leg_of(kept, finish_reason="engine_lost"), leg_of(kept, 1)]
    first, second = await audit_legs(fake, kept, legs)
    assert first.verdict == "agrees" and second.verdict == "differs"
    assert second.first is not None and second.first.index == 20
    assert second.first.position == len(PROMPT) + 20
    assert verdict_of([first, second]) == "differs"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("counted", "told"),
    [
        ({"prompt_tokens": 1000}, "it counts 1000 prompt tokens, and commits to 10"),
        ({"completion_tokens": 31}, "it counts 31 completion tokens, and commits to 30"),
        ({"completion_tokens": 29}, "it counts 29 completion tokens, and commits to 30"),
    ],
)
async def test_other_numbers_of_tokens_than_are_committed_to_differ(
    fake: EngineProcess, counted: dict[str, int], told: str
) -> None:
    """What is counted is paid."""
    kept = transcript(said())
    (right,) = await audit_legs(fake, kept, [leg_of(kept)])
    (wrong,) = await audit_legs(fake, kept, [leg_of(kept, **counted)])
    assert (right.verdict, wrong.verdict) == ("agrees", "differs")
    assert told in wrong.meaning


@pytest.mark.anyio
async def test_tokens_that_the_model_does_not_have_differ(fake: EngineProcess) -> None:
    """Else a node that cheats names one in each answer, and is never audited."""
    tokens = said()
    kept = transcript(tokens[:12], [*tokens[12:], 257])
    legs = [leg_of(kept, finish_reason="peer_lost"), leg_of(kept, 1)]
    first, second = await audit_legs(fake, kept, legs)
    assert first.verdict == "not auditable"  # and is not to blame for the one after it
    assert second.verdict == "differs"
    assert "its output has token 257, and the model has tokens 0 to 256" in second.meaning
    for prompt, told in (([], "its prompt has no tokens"), ([2**32 - 1], "its prompt has token")):
        asked = [msgspec.structs.replace(transcript(tokens).prompts[0], tokens=prompt)]
        kept = msgspec.structs.replace(transcript(tokens), prompts=asked)
        (audit,) = await audit_legs(fake, kept, [leg_of(kept)])
        assert audit.verdict == "differs" and told in audit.meaning


@pytest.mark.anyio
async def test_what_was_asked_may_be_any_json(fake: EngineProcess) -> None:
    tokens = said()
    for text in ("{}", '{"prompt":[]}', '{"prompt":[[]]}', '{"prompt":5,"messages":5}'):
        asked = [msgspec.structs.replace(transcript(tokens).prompts[0], asked=text)]
        kept = msgspec.structs.replace(transcript(tokens), prompts=asked)
        (audit,) = await audit_legs(fake, kept, [leg_of(kept)])
        assert audit.verdict == "agrees"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reason", "end", "told"),
    [
        ("stop", [], "ended by 'stop', and by its tokens it is 'length'"),
        ("length", [256], "ended by 'length', and by its tokens it is 'stop'"),
        ("length", [256, 65], "ends with its token 31, and the proof has 1 more"),
        ("stop", [256], ""),
        ("cancelled", [], ""),
    ],
)
async def test_an_answer_ends_as_it_says(
    fake: EngineProcess, reason: str, end: list[int], told: str
) -> None:
    """The end token is one that this model would not draw: a single one of 31 may differ."""
    kept = transcript([*said(), *end])
    bias = {str(256): 60.0} if end else {}
    sampling = sampling_record(Sampling(temperature=0.0, logit_bias=bias, min_tokens=30), 40)
    (audit,) = await audit_legs(fake, kept, [leg_of(kept, finish_reason=reason, sampling=sampling)])
    assert audit.verdict == ("differs" if told else "agrees") and told in audit.meaning


@pytest.mark.anyio
async def test_a_text_that_is_not_the_tokens_own(fake: EngineProcess) -> None:
    kept = transcript(said())
    kept = msgspec.structs.replace(
        kept, legs=[msgspec.structs.replace(kept.legs[0], text="Else")]
    )  # fmt: skip
    (audit,) = await audit_legs(fake, kept, [leg_of(kept)])
    assert audit.verdict == "differs" and "text" in audit.meaning


@pytest.mark.anyio
async def test_nobody_answers_for_the_text_of_another_leg(fake: EngineProcess) -> None:
    tokens = said()
    kept = transcript(tokens[:12], tokens[12:])
    for number, expected in ((0, ["differs", "agrees"]), (1, ["agrees", "differs"])):
        legs = list(kept.legs)
        legs[number] = msgspec.structs.replace(legs[number], text="Else")
        lying = msgspec.structs.replace(kept, legs=legs)
        signed = [leg_of(lying, finish_reason="peer_lost"), leg_of(lying, 1)]
        assert [audit.verdict for audit in await audit_legs(fake, lying, signed)] == expected


WEATHER = Tools('[{"name":"weather"}]', ["weather"])
UNSUITABLE: dict[str, tuple[Callable[[], tuple[RequestTranscript, Change]], str]] = {
    "another model": (lambda: (transcript(said()), {"model_digest": "ab" * 32}), "no model"),
    "another output": (lambda: (transcript(said()), {"output_commitment": "ab" * 32}), "output"),
    "another prompt": (lambda: (transcript(said()), {"prompt_commitment": "ab" * 32}), "prompt"),
    "another request": (
        lambda: (msgspec.structs.replace(transcript(said()), request_id="req_1"), {}), "req_1"
    ),
    "other tools": (lambda: (transcript(said(), tools=WEATHER), {}), "tools"),
    "no tools": (lambda: (transcript(said(), asked={"tools": "[]"}), {}), "tools"),
    "another grammar": (
        lambda: (transcript(said(), constraint=Constraint("regex", "a*")), {}), "constraint"
    ),
    "too long": (lambda: (transcript(said(195)), {}), "a context of 205 tokens"),
    "a context of another size": (
        lambda: (transcript(said()), {"shifted_tokens": shifted_with(30, len(PROMPT), 30)}),
        "shifted",
    ),
    "parameters of a later version": (
        lambda: (transcript(said()), {"sampling": {"seed": "x"}}), "cannot compute it again"
    ),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("case", UNSUITABLE.values(), ids=[*UNSUITABLE])
async def test_what_cannot_be_audited_says_why(
    fake: EngineProcess, case: tuple[Callable[[], tuple[RequestTranscript, Change]], str]
) -> None:
    make, told = case
    kept, change = make()
    (audit,) = await audit_legs(fake, kept, [leg_of(kept, **change)])
    assert audit.verdict == "not auditable" and told in audit.meaning, audit.meaning
    assert verdict_of([audit]) == "not auditable"


@pytest.mark.anyio
async def test_no_context_shifts_so(fake: EngineProcess) -> None:
    """Who says so does not escape its audit."""
    kept = transcript(said())
    for shifted in (-1, 1, 31, 999):
        (audit,) = await audit_legs(fake, kept, [leg_of(kept, shifted_tokens=shifted)])
        assert audit.verdict == "differs" and "no context" in audit.meaning


@pytest.mark.anyio
async def test_a_leg_needs_those_before_it(fake: EngineProcess) -> None:
    kept = transcript(said()[:10], said()[10:])
    leg = leg_of(kept, 1)
    later = msgspec.structs.replace(kept, legs=kept.legs[1:])
    (audit,) = await audit_legs(fake, later, [leg])
    assert audit.verdict == "not auditable" and "before it" in audit.meaning


# -- judging ---------------------------------------------------------------------------------------


def tokens_of(*margins: float, same: int = 0) -> list[ReplayedToken]:
    right = [ReplayedToken(5, 5, 1.5, 1.5)] * same
    return [*right, *(ReplayedToken(5, 6, 1.5, 2.0, margin) for margin in margins)]


def proof(tokens: list[ReplayedToken], **more: Any) -> Proof:
    return receipt_vectors.proof(
        v=4, completion_tokens=len(tokens), finish_reason="length",
        **{"exactness": "bitwise:haswell b f16", "logits_sha256": digest_of(tokens), **more},
    )  # fmt: skip


def test_bits_are_compared_only_with_an_engine_of_the_same_exactness() -> None:
    tokens = tokens_of(0.01, same=99)
    for exactness, mode, verdict in (
        ("bitwise:haswell b f16", "bitwise", "differs"),
        ("bitwise:sse42 b f16", "statistical", "agrees"),
        ("", "statistical", "agrees"),
    ):
        answer = ReplayedAnswer(tokens, "length", exactness)
        audit = judge(proof(tokens), answer, 0, is_last=True)
        assert (audit.mode, audit.verdict) == (mode, verdict)
        assert (audit.agreeing, audit.margins) == (99, [0.01])


def test_what_is_kept_for_good_names_no_token() -> None:
    tokens = [ReplayedToken(31337, 31338, 11.5, 12.5, 0.25), *tokens_of(same=9)]
    answer = ReplayedAnswer(tokens, "length", "bitwise:haswell b f16")
    audit = judge(proof(tokens), answer, 0, is_last=True)
    kept = without_tokens(audit)
    for word in (b"31337", b"31338", b"11.5", b"12.5", b"0.25"):
        assert word in msgspec.json.encode(audit) and word not in msgspec.json.encode(kept)
    assert "another token was drawn at position 30 (token 1 of the answer)" in kept.meaning
    agreeing = judge(proof(tokens[1:]), answer, 1, is_last=True)
    assert without_tokens(agreeing) == agreeing


def test_numbers_that_differ_are_no_proof_elsewhere() -> None:
    tokens = tokens_of(same=50)
    other = proof(tokens, logits_sha256="ab" * 32)
    exact = ReplayedAnswer(tokens, "length", "bitwise:haswell b f16")
    audit = judge(other, exact, 0, is_last=True)
    assert (audit.verdict, audit.numbers) == ("differs", False) and "all 50" in audit.meaning
    audit = judge(other, msgspec.structs.replace(exact, exactness=""), 0, is_last=True)
    assert (audit.verdict, audit.numbers) == ("agrees", None)


def test_a_token_that_is_not_allowed_differs_in_either_mode() -> None:
    tokens = [*tokens_of(same=99), ReplayedToken(5, 6, 1.5, 2.0, math.inf, possible=False)]
    more = proof([*tokens, *tokens_of(same=5)])
    for exactness in ("", "bitwise:haswell b f16"):
        audit = judge(more, ReplayedAnswer(tokens, "stop", exactness), 0, is_last=True)
        assert audit.verdict == "differs" and "not allowed there" in audit.meaning
        assert audit.first is not None and audit.first.margin is None


def test_the_tail_is_that_of_the_binomial_distribution() -> None:
    for trials, rate in ((1, 0.5), (10, 0.06), (200, 0.004)):
        for successes in range(trials + 1):
            exact = math.fsum(
                math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k)
                for k in range(successes, trials + 1)
            )
            assert math.isclose(binomial_tail(trials, successes, rate), exact, abs_tol=1e-12)


def test_an_honest_node_is_hardly_ever_accused() -> None:
    """At exactly the rates that are honest, over all counts that may come of them."""
    for trials in (20, 100, 300, 1000):
        alarms = 0.0
        for rate, large in ((HONEST_RATE, False), (HONEST_LARGE_RATE, True)):
            least = next(
                k for k in range(trials + 2)
                if Divergence(trials, k, k if large else 0).p_value < FALSE_ALARM_RATE
                or k > trials
            )  # fmt: skip
            alarms += binomial_tail(trials, least, rate)
        assert alarms <= FALSE_ALARM_RATE


# -- contexts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "output"), [(40, 160), (40, 161), (110, 500), (199, 2), (9, 9)])
def test_a_context_forgets_as_an_engine_does(prompt: int, output: int) -> None:
    """That is how its size is found again."""
    first = run(made()[0], [add("r", "x", 1)]).prompts["r"]
    text = "x" * (prompt - len(first) + 1)
    if prompt < len(first):
        text, prompt = "x", len(first)
    heard = run(
        made(context=200, shift=True)[0], [add("r", text, output)]
    )  # fmt: skip
    shifted = heard.shifted["r"][-1]
    assert len(heard.prompts["r"]) == prompt
    assert shifted == shifted_with(200, prompt, output)
    if shifted:
        assert context_of(prompt, output, shifted, 200) == 200
        found = context_of(prompt, output, shifted, 0)
        assert found is not None and shifted_with(found, prompt, output) == shifted


def test_an_answer_that_was_to_go_on_has_made_room() -> None:
    """It was cancelled just when its context was full."""
    engine, _ = made(context=200, shift=True)
    heard = Heard()
    engine.receive(add("r", "x" * 90, 300, logprobs=0))
    while engine.busy and not any(heard.shifted.get("r", [])):
        heard.take(engine.step())
    prompt, output = len(heard.prompts["r"]), len(heard.tokens["r"])
    assert prompt + output == 200
    assert may_shift(200, prompt, output, heard.shifted["r"][-1])
    assert shifted_with(200, prompt, output) == 0


def test_no_context_forgets_that_many() -> None:
    assert context_of(10, 100, 10_000, 64) is None


@pytest.mark.parametrize(
    ("prompt", "output", "shifted"),
    [(0, 10, 5), (0, 2, 1), (1, 200_000, 199_999), (5, 2**53 - 1, 2**52), (-9, 50, 20)],
)
def test_numbers_that_a_node_made_up_are_looked_at_in_the_end(
    prompt: int, output: int, shifted: int
) -> None:
    """Who signs a proof chooses them: a context of one token forgets nothing, for ever."""
    found = context_of(prompt, output, shifted, 4096)
    assert found is None or may_shift(found, prompt, output, shifted)
