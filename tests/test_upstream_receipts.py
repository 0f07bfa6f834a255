"""Receipts of legs that an upstream has made: what may be in them, and what is found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785

from pinaivu_box.identity import Identity
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    NOT_A_BOX,
    PROOF_DOMAIN,
    RECEIPT_DOMAIN,
    UPSTREAM_DOMAIN,
    EngineBuild,
    Price,
    Proof,
    Receipt,
    SignedProof,
    TokenUsage,
    UpstreamLeg,
    sign_proof,
    sign_receipt,
    sign_upstream_leg,
    upstream_digest,
    view,
)
from pinaivu_box.receipts.verify import VerificationCheck, verify_receipt
from tests.support.keys import known_identity

OWN, OTHER = known_identity(1), known_identity(2)
PRICE = Price("credits", "1", "1", "1")
PROMPT = commitment.prompt_text([{"role": "user", "content": "Why?"}], [])
NONCE = "ab" * 32
Change = Callable[[dict[str, Any]], None]


def leg(**more: Any) -> UpstreamLeg:
    prompt, _ = commitment.commit(PROMPT, None, NONCE)
    output, _ = commitment.commit("Because.", None, NONCE, [commitment.Extras()])
    fields: dict[str, Any] = {
        "request_id": "req_1", "leg": 0, "node_id": OWN.node_id, "model": "big:70b",
        "upstream": "cluster", "upstream_model": "meta/big", "sampling": {},
        "prompt_commitment": prompt, "output_commitment": output, "prompt_tokens": 10,
        "completion_tokens": 5, "cached_tokens": 0, "tokens_counted_by": "upstream",
        "finish_reason": "stop", "started_at": "2026-11-30T09:00:00.000Z", "ttft_ms": 1,
        "duration_ms": 2, "price": PRICE,
    }  # fmt: skip
    return UpstreamLeg(**{**fields, **more})


def box_leg(tokens: list[int], **more: Any) -> Proof:
    prompt, _ = commitment.commit(PROMPT, [1, 2, 3], NONCE)
    output, _ = commitment.commit("Since.", tokens, NONCE, [commitment.Extras()])
    return Proof(
        request_id="req_1", leg=0, node_id=OTHER.node_id, model="big:70b", model_digest="cd" * 32,
        engine=EngineBuild("b1", "CPU"), sampling={}, prompt_commitment=prompt,
        output_commitment=output, prompt_tokens=3, completion_tokens=len(tokens), cached_tokens=0,
        shifted_tokens=0, finish_reason="stop", started_at="2026-11-30T09:00:00.000Z", ttft_ms=1,
        duration_ms=2, price=PRICE, **more,
    )  # fmt: skip


def document(*proofs: SignedProof, by: Identity = OWN, **more: Any) -> bytes:
    """A receipt of these legs that the box signs."""
    first = leg()
    fields: dict[str, Any] = {
        "request_id": "req_1", "timestamp": "2026-11-30T09:00:01.000Z",
        "coordinator_id": by.node_id, "node_id": first.node_id, "model": "big:70b",
        "model_digest": upstream_digest("big:70b"), "payment_amount": "0.015",
        "currency": "credits", "finish_reason": "stop", "routing": {}, "proofs": list(proofs),
        "prompt_commitment": first.prompt_commitment,
        "output_commitment": first.output_commitment, "usage": TokenUsage(10, 5, 0),
        "price": PRICE, "v": 3,
    }  # fmt: skip
    signed, signature = sign_receipt(by, Receipt(**{**fields, **more}))
    shown = view(signed, signature, None)
    names = ("request_id", "node_id", "model", "timestamp", "payment_amount")
    whole = {name: getattr(shown, name) for name in names}
    whole |= {
        "coordinator_signature": shown.coordinator_signature,
        "signed_receipt": shown.signed_receipt, "object": "receipt",
    }  # fmt: skip
    return json.dumps(whole).encode()


def failed(data: bytes) -> list[VerificationCheck]:
    return [check for check in verify_receipt(data) if not check.ok]


def test_a_leg_of_an_upstream_verifies_and_says_what_it_is() -> None:
    checks = verify_receipt(document(sign_upstream_leg(OWN, leg())))
    assert all(check.ok for check in checks), checks
    (said,) = [check for check in checks if check.name == "leg 0"]
    assert said.meaning.startswith(f"{NOT_A_BOX}: ") and "nobody proves" in said.meaning
    assert json.loads(sign_upstream_leg(OWN, leg()).signed)["kind"] == NOT_A_BOX


def test_choices_of_boxes_and_upstreams_share_a_receipt() -> None:
    proof = box_leg([7, 8], choice=1)
    both = [sign_upstream_leg(OWN, leg()), sign_proof(OTHER, proof)]
    more: dict[str, Any] = {
        "node_id": OTHER.node_id, "model_digest": "cd" * 32, "usage": TokenUsage(10, 7, 0),
        "payment_amount": "0.017",
    }  # fmt: skip
    assert failed(document(*both, **more)) == []


def signed_as(identity: Identity, domain: str, change: Change) -> SignedProof:
    fields = json.loads(sign_upstream_leg(OWN, leg()).signed)
    change(fields)
    text = rfc8785.dumps(fields)
    return SignedProof(text.decode(), identity.sign(domain, text).hex())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda fields: fields.update(kind="a box"), "not a proof"),
        (lambda fields: fields.pop("kind"), "not a proof"),
        (lambda fields: fields.update(v=2), "not a proof"),
        (lambda fields: fields.update(more=1), "not a proof"),
        (lambda fields: fields.update(completion_tokens=-5), "not a proof"),
        (lambda fields: fields.update(tokens_counted_by="me"), "not a proof"),
        (lambda fields: fields.update(request_id="req_2"), "another request_id"),
        (lambda fields: fields.update(model="small:1b"), "another model"),
        (lambda fields: fields.update(completion_tokens=6), "counts other tokens"),
        (lambda fields: fields.update(leg=1), "leg of an answer is missing"),
        (lambda fields: fields.update(prompt_commitment="00" * 32), "another prompt"),
    ],
)
def test_a_statement_that_does_not_fit_is_found_out(change: Change, why: str) -> None:
    wrong = failed(document(signed_as(OWN, UPSTREAM_DOMAIN, change)))
    assert wrong and why in wrong[0].meaning


def test_nobody_else_and_no_other_signature_will_do() -> None:
    def nothing(fields: dict[str, Any]) -> None:
        pass

    forged = signed_as(OTHER, UPSTREAM_DOMAIN, nothing)
    assert "signature is not" in failed(document(forged))[0].meaning
    as_proof = signed_as(OWN, PROOF_DOMAIN, nothing)
    assert "signature is not" in failed(document(as_proof))[0].meaning
    of_another = signed_as(OTHER, UPSTREAM_DOMAIN, lambda each: each.update(node_id=OTHER.node_id))
    assert "names another node" in failed(document(of_another))[0].meaning
    honest = sign_upstream_leg(OWN, leg())
    assert "receipt of version 2" in failed(document(honest, v=2))[0].meaning


def test_a_peer_that_asked_its_upstream_signs_for_it() -> None:
    statement = leg(node_id=OTHER.node_id)
    data = document(sign_upstream_leg(OTHER, statement), node_id=OTHER.node_id)
    assert failed(data) == []
    (said,) = [check for check in verify_receipt(data) if check.name == "leg 0"]
    assert f"{OTHER.node_id} says that it asked the upstream" in said.meaning


def test_of_a_peer_that_was_lost_the_coordinator_says_so() -> None:
    statement = leg(node_id=OTHER.node_id)
    data = document(sign_upstream_leg(OWN, statement), node_id=OTHER.node_id)
    assert failed(data) == []
    (said,) = [check for check in verify_receipt(data) if check.name == "leg 0"]
    assert f"{OWN.node_id} says that {OTHER.node_id}, which was lost" in said.meaning
    nobody = document(sign_upstream_leg(known_identity(3), statement), node_id=OTHER.node_id)
    assert "the signature is not" in failed(nobody)[0].meaning


def test_a_commitment_without_tokens_is_none_to_an_empty_list_of_them() -> None:
    extras = [commitment.Extras()]
    without, opening = commitment.commit("a", None, NONCE, extras)
    assert without != commitment.commit("a", [], NONCE, extras)[0]
    assert commitment.recompute("a", opening) == commitment.reopen(opening) == without
    prompt, opened = commitment.commit("a", None, NONCE)
    assert prompt not in (without, commitment.commit("a", [], NONCE)[0])
    assert commitment.recompute("a", opened) == prompt and opened.tokens_sha256 == ""


def test_receipts_of_boxes_alone_are_what_they_were() -> None:
    """Their version is 2, and nothing that this version knows is in them."""
    fields = json.loads(sign_proof(OTHER, box_leg([1])).signed)
    assert fields["v"] == 2 and not {"kind", "upstream"} & fields.keys()
    assert RECEIPT_DOMAIN == "pinaivu/receipt/v1"
