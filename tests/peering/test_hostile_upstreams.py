"""A peer that says it asked its upstream, and lies about it: what the verifier of a leg refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from pinaivu_box.engine.messages import Sampling, SamplingParams
from pinaivu_box.gateway.backend import Counted, Job, Started, UpstreamModel
from pinaivu_box.gateway.metering import upstream_leg
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.verify import LegVerifier, ProtocolViolation, most_of_upstream
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    EngineBuild,
    Price,
    SignedProof,
    UpstreamLeg,
    mark_text,
    sign_upstream_leg,
    upstream_digest,
)
from pinaivu_box.routing.router import Destination
from tests.support.keys import known_identity

PEER, OTHER = known_identity(1), known_identity(2)
NAME = "big:70b"
DIGEST = upstream_digest(NAME)
PRICE = Price("credits", "1", "1", "1")
TO = Destination(PEER.node_id, "peer", DIGEST, ("1", "1", "1"), "credits", of_upstream=True)
JOB = Job(
    request_id="req_1",
    model=Model(NAME, Path(), recorded_digest=DIGEST, remote=True),
    messages=[{"role": "user", "content": "Why?"}],
    sampling=SamplingParams(seed=7, temperature=0.5),
    max_tokens=20,
    stop=[],
    tenant="key_1",
)
BEGAN = leg_wire.LegStarted(
    DIGEST, "cluster", "upstream", Sampling(temperature=0.5, seed=7), "tags", True, new_nonce(), 3,
    leg_wire.AskedUpstream("cluster", "meta/big"),
)  # fmt: skip


def statement(text: str = "Because.", **changes: Any) -> UpstreamLeg:
    started = Started(
        PEER.node_id, DIGEST, EngineBuild("cluster", "upstream"), BEGAN.sampling, "tags", True,
        BEGAN.nonce, 3, UpstreamModel("cluster", "meta/big"), {"temperature": 0.5},
    )  # fmt: skip
    record = LegRecord(JOB, started, text=[text], finish_reason="stop")
    record.counted = Counted(10, 0, 5, estimated=False)
    return msgspec.structs.replace(upstream_leg(record, PRICE)[0], **changes)


def outputs(text: str = "Because.", reason: str | None = "stop", **more: Any) -> leg_wire.Outputs:
    said = RunningCommitment(BEGAN.nonce, 3)
    said.add(text, [])
    mark = PEER.sign(MARK_DOMAIN, mark_text("req_1", 0, 0, 0, said.commitment)).hex()
    return leg_wire.Outputs([leg_wire.Out(text, [], reason, 1.0, **more)], mark)


def prove(
    signed: SignedProof,
    began: leg_wire.LegStarted = BEGAN,
    read: leg_wire.PromptRead | None = None,
    last: leg_wire.Outputs | None = None,
    to: Destination = TO,
) -> UpstreamLeg:
    verifier = LegVerifier(JOB, to)
    verifier.begin(began)
    verifier.read(read or leg_wire.PromptRead([]))
    verifier.keep_proof(leg_wire.LegProof(signed.signed, signed.signature))
    last = last or outputs()
    verifier.take(last)
    assert verifier.end(last)
    proved, _ = verifier.prove(last.outputs[-1].finish_reason or "")
    assert isinstance(proved, UpstreamLeg)
    return proved


def test_an_honest_statement_is_accepted() -> None:
    assert prove(sign_upstream_leg(PEER, statement())).completion_tokens == 5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"completion_tokens": 21}, "more tokens"),
        ({"prompt_tokens": 10**6}, "more tokens"),
        ({"cached_tokens": 11}, "more cached"),
        ({"request_id": "req_2"}, "another request_id"),
        ({"choice": 1}, "another choice"),
        ({"leg": 1}, "another leg"),
        ({"model": "other:1b"}, "another model"),
        ({"upstream": "elsewhere"}, "another upstream"),
        ({"upstream_model": "meta/small"}, "another upstream_model"),
        ({"finish_reason": "length"}, "another finish_reason"),
        ({"output_commitment": "00" * 32}, "another output_commitment"),
        ({"prompt_commitment": "00" * 32}, "another prompt_commitment"),
        ({"sampling": {"temperature": 1.5}}, "other sampling"),
        ({"price": Price("credits", "2", "1", "1")}, "higher price"),
        ({"price": Price("euro", "1", "1", "1")}, "higher price"),
        ({"node_id": OTHER.node_id}, "another node_id"),
    ],
)
def test_a_statement_that_says_something_else_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        prove(sign_upstream_leg(PEER, statement(**changes)))


def test_another_signature_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="invalid signature"):
        prove(sign_upstream_leg(OTHER, statement()))
    text = sign_upstream_leg(PEER, statement()).signed
    as_proof = SignedProof(text, PEER.sign("pinaivu/proof/v1", text.encode()).hex())
    with pytest.raises(ProtocolViolation, match="invalid signature"):
        prove(as_proof)


def test_token_ids_and_other_beginnings_are_refused() -> None:
    signed = sign_upstream_leg(PEER, statement())
    with pytest.raises(ProtocolViolation, match="tokens of an upstream"):
        prove(signed, read=leg_wire.PromptRead([1, 2]))
    with pytest.raises(ProtocolViolation, match="more tokens than requested"):
        prove(
            signed, last=leg_wire.Outputs([leg_wire.Out("Because.", [1], "stop", 1.0)], "0" * 128)
        )
    with pytest.raises(ProtocolViolation, match="version of proofs"):
        prove(signed, began=msgspec.structs.replace(BEGAN, proof=2))
    with pytest.raises(ProtocolViolation, match="in the place of a box"):
        prove(signed, began=msgspec.structs.replace(BEGAN, upstream=UNSET))
    with pytest.raises(ProtocolViolation, match="in the place of a box"):
        prove(signed, to=replace(TO, of_upstream=False))


def test_no_more_tokens_are_billed_than_the_text_can_have() -> None:
    prompt, completion = most_of_upstream(replace(JOB, max_tokens=None), len("é".encode()) * 10)
    assert completion == 2 * 7 + 64 and 12 < prompt < 300
    assert most_of_upstream(JOB, 1000)[1] == JOB.max_tokens
