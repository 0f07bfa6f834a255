"""Receipts of every form, right ones and wrong ones, for all who verify: `tests/vectors/receipts`.

`python -m tests.support.receipt_vectors` writes the files anew, with what is wrong with each in
`expected.json`: the names of the checks that fail.  The keys are known, so the bytes are always the
same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import rfc8785

from pinaivu_box.amount import to_text
from pinaivu_box.identity import Identity
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    PROOF_DOMAIN,
    RECEIPT_DOMAIN,
    UPSTREAM_DOMAIN,
    EngineBuild,
    LegStatement,
    Price,
    Proof,
    Receipt,
    SignedProof,
    TokenUsage,
    UpstreamLeg,
    mark_text,
    prompts_of,
    total_cost,
    upstream_digest,
)
from pinaivu_box.receipts.verify import verify_receipt
from tests.support.keys import known_identity

FOLDER = Path(__file__).parent.parent / "vectors" / "receipts"
EXPECTED = FOLDER / "expected.json"
OWN, PEER = known_identity(1), known_identity(2)
MODEL = "mini-modèle:7b"
DIGEST = "cd" * 32
CHEAP = Price("EUR", "0.25", "0.025", "1.5")
SHOWN = ("request_id", "node_id", "model", "timestamp", "payment_amount")
_IDENTITIES = {identity.node_id: identity for identity in (OWN, PEER)}
Json = dict[str, Any]


def proof(node: Identity = OWN, **more: Any) -> Proof:
    """Of one leg on a box, which may be the first of the only choice."""
    fields: Json = {
        "request_id": "req_01m8jw26mke71a7sxaax08p8mq", "leg": 0, "node_id": node.node_id,
        "model": MODEL, "model_digest": DIGEST, "engine": EngineBuild("b1", "CPU"),
        "sampling": {"seed": str(2**64 - 1), "temperature": 0.7, "top_k": 40, "stop": ["<end>"]},
        "prompt_commitment": commitment_of("prompt", more.get("prompt", 0)),
        "output_commitment": commitment_of("output", more.get("leg", 0)), "prompt_tokens": 30,
        "completion_tokens": 12, "cached_tokens": 8, "shifted_tokens": 0, "finish_reason": "stop",
        "started_at": "2026-11-30T09:00:00.000Z", "ttft_ms": 41, "duration_ms": 250,
        "price": CHEAP,
    }  # fmt: skip
    return Proof(**{**fields, **more})


def upstream_leg(**more: Any) -> UpstreamLeg:
    fields: Json = {
        "request_id": "req_01m8jw26mke71a7sxaax08p8mq", "leg": 0, "node_id": OWN.node_id,
        "model": MODEL, "upstream": "cluster", "upstream_model": "maker/mini 7B", "sampling": {},
        "prompt_commitment": commitment_of("upstream", 0),
        "output_commitment": commitment_of("output", 9), "prompt_tokens": 31,
        "completion_tokens": 5, "cached_tokens": 0, "tokens_counted_by": "upstream",
        "finish_reason": "stop", "started_at": "2026-11-30T09:00:00.000Z", "ttft_ms": None,
        "duration_ms": 90, "price": CHEAP,
    }  # fmt: skip
    return UpstreamLeg(**{**fields, **more})


def commitment_of(what: str, number: int) -> str:
    text, nonce = f"{what} {number}", f"{number:064x}"
    return commitment.commit(text, [1, 2, number], nonce)[0]


def lost(*, mark: bool, **more: Any) -> Proof:
    """A leg of a peer that was lost, as the coordinator says it."""
    leg = proof(PEER, witness=OWN.node_id, finish_reason="peer_lost", **more)
    if not mark:
        return leg
    text = mark_text(
        leg.request_id, leg.choice, leg.leg, leg.completion_tokens, leg.output_commitment
    )
    return msgspec.structs.replace(leg, mark=PEER.sign(MARK_DOMAIN, text).hex())


def signed(statement: LegStatement | Json, by: Identity | None = None) -> SignedProof:
    fields: Json = statement if isinstance(statement, dict) else msgspec.to_builtins(statement)
    domain = UPSTREAM_DOMAIN if "upstream" in fields else PROOF_DOMAIN
    signer = by or _IDENTITIES[fields.get("witness") or fields["node_id"]]
    text = rfc8785.dumps(fields)
    return SignedProof(text.decode(), signer.sign(domain, text).hex())


def receipt(*legs: LegStatement, **more: Any) -> Json:
    """The fields of a receipt of these legs, which they add up to."""
    prompts, last = prompts_of(legs), legs[-1]
    usage = TokenUsage(
        sum(leg.prompt_tokens for leg in prompts),
        sum(leg.completion_tokens for leg in legs),
        sum(leg.cached_tokens for leg in prompts),
    )
    whole = Receipt(
        request_id=last.request_id, timestamp="2026-11-30T09:00:00.000Z",
        coordinator_id=OWN.node_id, node_id=last.node_id, model=MODEL,
        model_digest=DIGEST if any(isinstance(leg, Proof) for leg in legs)
        else upstream_digest(MODEL),
        payment_amount=to_text(total_cost(legs, CHEAP)), currency="EUR", finish_reason="stop",
        routing={"policy": "local", "chosen": last.node_id}, proofs=[signed(leg) for leg in legs],
        prompt_commitment=commitment.of_several([leg.prompt_commitment for leg in prompts]),
        output_commitment=commitment_of("output", 0), usage=usage, price=CHEAP,
        v=3 if any(isinstance(leg, UpstreamLeg) for leg in legs) else 2,
    )  # fmt: skip
    fields: Json = msgspec.to_builtins(whole)
    return {**fields, **more}


def document(fields: Json, **beside: Any) -> bytes:
    """As the API serves it, signed by the coordinator."""
    return document_of_text(rfc8785.dumps(fields).decode(), fields, **beside)


def document_of_text(text: str, fields: Json, **beside: Any) -> bytes:
    signature = OWN.sign(RECEIPT_DOMAIN, text.encode()).hex()
    view: Json = {
        **{name: fields.get(name) for name in SHOWN}, "coordinator_signature": signature,
        "signed_receipt": text, "object": "receipt",
    }  # fmt: skip
    return json.dumps({**view, **beside}, ensure_ascii=False).encode()


def _changed(leg: LegStatement, change: Callable[[Json], None]) -> Json:
    """The receipt of a leg in which something was changed before all was signed."""
    fields: Json = msgspec.to_builtins(leg)
    change(fields)
    return {**receipt(leg), "proofs": [msgspec.to_builtins(signed(fields))]}


def vectors() -> dict[str, bytes]:
    from tests.support.log_vectors import log_vectors  # which makes its receipts with this module

    return receipts() | log_vectors()


def receipts() -> dict[str, bytes]:
    one = receipt(proof())
    text = rfc8785.dumps(one).decode()
    opening = {
        "prompt": {"nonce": "0" * 64, "tokens_sha256": "0" * 64},
        "output": {"nonce": "1" * 64, "tokens_sha256": "0" * 64, "text_sha256": "0" * 64},
        "legs": [], "stop": ["</s>"],
    }  # fmt: skip
    two: list[LegStatement] = [proof(), proof(PEER, choice=1, cached_tokens=30)]
    prompts: list[LegStatement] = [
        proof(),
        proof(prompt=1, choice=1, prompt_tokens=7, cached_tokens=0),
    ]
    moved = [lost(mark=True), proof(leg=1, completion_tokens=20)]
    mixed: list[LegStatement] = [proof(), upstream_leg(choice=1)]
    numbers = "ab" * 32
    exact = proof(v=4, exactness="bitwise:haswell llama.cpp 1 f16", logits_sha256=numbers)
    at_peer = upstream_leg(node_id=PEER.node_id)
    other_mark = msgspec.structs.replace(moved[0], completion_tokens=11)
    return {
        "one_box": document(one),
        "with_an_opening": document(one, opening=opening),
        "version_1": document({**receipt(proof(v=1)), "v": 1}),
        "a_proof_of_version_1": document(receipt(proof(v=1))),
        "an_exact_leg": document(receipt(exact)),
        "an_exact_leg_and_an_upstream": document(receipt(exact, upstream_leg(choice=1))),
        "an_exact_leg_in_version_1": document({**receipt(exact), "v": 1}),
        "an_exact_leg_of_version_2": document(receipt(proof(exactness="bitwise:x"))),
        "a_leg_of_which_nothing_is_promised": document(
            receipt(proof(v=4, exactness="statistical", logits_sha256=numbers))
        ),
        "numbers_in_a_proof_of_version_2": document(receipt(proof(logits_sha256=numbers))),
        "a_proof_of_version_4_without_exactness": document(
            receipt(proof(v=4, logits_sha256=numbers))
        ),
        "a_proof_of_version_4_without_numbers": document(
            receipt(proof(v=4, exactness="statistical"))
        ),
        "an_exactness_that_is_none": document(
            receipt(proof(v=4, exactness="", logits_sha256=numbers))
        ),
        "numbers_that_are_no_digest": document(
            receipt(proof(v=4, exactness="statistical", logits_sha256=numbers.upper()))
        ),
        "a_peer": document(receipt(proof(PEER, price=Price("EUR", "0", "0", "2.5e-1")))),
        "two_choices": document(receipt(*two)),
        "two_prompts": document(receipt(*prompts)),
        "a_node_was_lost": document(receipt(*moved)),
        "a_node_was_lost_without_a_mark": document(
            receipt(lost(mark=False), proof(leg=1, completion_tokens=20))
        ),
        "an_upstream": document(receipt(upstream_leg())),
        "an_upstream_that_counts_nothing": document(
            receipt(upstream_leg(tokens_counted_by="estimate"))
        ),
        "a_box_and_an_upstream": document(receipt(*mixed)),
        "each_leg_at_its_own_price": document({
            **receipt(*two), "price": None, "payment_amount": to_text(total_cost(two))
        }),
        "not_canonical": document_of_text(json.dumps(one, indent=1), one),
        "another_signature": document(one, coordinator_signature="0" * 128),
        "a_signature_in_capitals": document(one, coordinator_signature="AB" * 64),
        "another_field_beside": document(one, model="other:1", payment_amount="0"),
        "an_unknown_field": document(one, note="x"),
        "a_field_twice": document_of_text(f'{{"v":2,{text[1:]}', one),
        "a_field_twice_beside": document(one).replace(b'{"', b'{"object": "receipt", "', 1),
        "an_unknown_version": document({**one, "v": 4}),
        "a_huge_version": document_of_text(text.replace('"v":2}', '"v":' + "9" * 30 + "}"), one),
        "a_version_with_a_point": document_of_text(text.replace('"v":2}', '"v":2.0}'), one),
        "too_many_tokens_to_count": document_of_text(
            text.replace('"prompt_tokens":30', f'"prompt_tokens":{2**53}'), one
        ),
        "a_number_that_is_none": document_of_text(text.replace('"v":2}', '"v":NaN}'), one),
        "a_number_out_of_range": document_of_text(
            text.replace('"policy":"local"', '"policy":1e999'), one
        ),
        "half_a_pair": document_of_text(
            text.replace('"policy":"local"', '"policy":"\\ud83e"'), one
        ),
        "nested_too_deeply": document_of_text(
            text.replace('"policy":"local"', '"policy":' + "[" * 5000 + "]" * 5000), one
        ),
        "a_missing_field": document({name: one[name] for name in one if name != "usage"}),
        "another_time": document({**one, "timestamp": "2026-11-30 09:00:00"}),
        "other_tokens": document({**one, "usage": {**one["usage"], "completion_tokens": 13}}),
        "less_than_no_tokens": document(receipt(proof(completion_tokens=-1))),
        "another_payment": document({**one, "payment_amount": "0.03"}),
        "another_currency": document({**one, "currency": "USD"}),
        "no_price": document({
            **one, "price": {**one["price"], "completion": "1\u00a0'000"}
        }),
        "too_fine_a_price": document({**one, "price": {**one["price"], "cached": "1e-7"}}),
        "no_proof": document({**one, "proofs": []}),
        "a_proof_twice": document({**one, "proofs": one["proofs"] * 2}),
        "a_leg_missing": document(receipt(proof(leg=1))),
        "another_prompt": document({**one, "prompt_commitment": "0" * 64}),
        "a_proof_of_another_request": document(
            {**one, "request_id": "req_01m8jw26mke71a7sxaax08p8mr"}
        ),
        "a_proof_in_anothers_name": document({
            **one,
            "proofs": [{
                "signed": msgspec.to_builtins(signed(proof(PEER)))["signed"],
                "signature": one["proofs"][0]["signature"],
            }],
        }),
        "a_proof_with_another_field": document(
            _changed(proof(), lambda fields: fields.update(note="x"))
        ),
        "a_proof_of_version_2_in_1": document({**one, "v": 1}),
        "another_witness": document(receipt(proof(witness=PEER.node_id))),
        "another_mark": document(receipt(other_mark, moved[1])),
        "an_upstream_in_version_2": document({**receipt(upstream_leg()), "v": 2}),
        "an_upstream_of_a_peer": document(receipt(at_peer)),
        "an_upstream_of_a_peer_that_was_lost": document({
            **receipt(at_peer), "proofs": [msgspec.to_builtins(signed(at_peer, OWN))]
        }),
        "an_upstream_signed_by_another": document({
            **receipt(at_peer), "proofs": [msgspec.to_builtins(signed(at_peer, known_identity(3)))]
        }),
        "an_upstream_of_another_kind": document(
            _changed(upstream_leg(), lambda fields: fields.update(kind="a box"))
        ),
        "no_receipt": b'{"object": "list", "data": []}',
        "no_json": b'{"object": "receipt",}',
        "no_text": b'{"object": "\xff"}',
    }  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    expected: dict[str, list[str]] = {}
    for file in FOLDER.glob("*.json"):
        file.unlink()
    for name, data in vectors().items():
        (FOLDER / f"{name}.json").write_bytes(data)
        expected[name] = [check.name for check in verify_receipt(data) if not check.ok]
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
