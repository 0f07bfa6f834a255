"""Work that boxes did for each other, signed as they sign it, for the tests of the ledger."""

from __future__ import annotations

from typing import Any

from pinaivu_box.identity import Identity
from pinaivu_box.ledger.entry import LedgerEntry, costs
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    EngineBuild,
    Price,
    Proof,
    canonical,
    sign_proof,
)

PRICE = Price("credits", "0.5", "0.1", "2")


def proof(server: Identity, request_id: str = "req_1", **more: Any) -> Proof:
    fields: dict[str, Any] = {
        "leg": 0, "model": "m:1", "model_digest": "00" * 32, "engine": EngineBuild("b1", "cpu"),
        "sampling": {"seed": "7"}, "prompt_commitment": "11" * 32, "output_commitment": "22" * 32,
        "prompt_tokens": 20, "completion_tokens": 10, "cached_tokens": 5, "shifted_tokens": 0,
        "finish_reason": "stop", "started_at": "2026-11-01T00:00:00.000Z", "ttft_ms": 3,
        "duration_ms": 9, "price": PRICE,
    }  # fmt: skip
    return Proof(request_id=request_id, node_id=server.node_id, **{**fields, **more})


def entry(
    us: Identity,
    peer: Identity,
    request_id: str = "req_1",
    *,
    served_by_us: bool = True,
    prompt_paid: bool = True,
    accepted: bool = True,
    at: int = 1,
    **more: Any,
) -> LedgerEntry:
    """As the box `us` writes it."""
    server, coordinator = (us, peer) if served_by_us else (peer, us)
    made = proof(server, request_id, **more)
    signed = canonical(made)
    try:
        output, prompt = costs(made)
    except ValueError:  # a proof of what cannot be
        output = prompt = 0
    return LedgerEntry(
        peer=peer.node_id,
        served_by_us=served_by_us,
        request_id=request_id,
        leg=made.leg,
        choice=made.choice,
        amount=output + prompt * prompt_paid,
        currency=made.price.currency,
        at=at,
        proof=signed,
        signature=bytes.fromhex(sign_proof(server, made).signature),
        acceptance=coordinator.sign(ACCEPTANCE_DOMAIN, signed) if accepted else b"",
    )
