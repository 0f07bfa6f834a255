"""Evidence that a leg was not computed as its proof says: what this box signs of it, and how others
verify it offline.  Pure.

The document is what `pinaivu ledger evidence` prints: the signed finding with the peer's own
proof in it, and, as far as they are still there and can be opened, receipt and transcript.  With
these whoever has the model's file computes the leg again; without, it is the auditor's word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.identity import Identity, verify
from pinaivu_box.receipts.receipt import (
    Digest,
    NodeId,
    Proof,
    ReceiptView,
    RequestId,
    SignedProof,
    Time,
    canonical,
)
from pinaivu_box.receipts.transcript import RequestTranscript, mismatch, openings_of
from pinaivu_box.receipts.verify import VerificationCheck, is_signed, read_proof, read_statement
from pinaivu_box.text import SIGNATURE

DOMAIN = "pinaivu/disproof/v1"


class Disproof(Struct, frozen=True, forbid_unknown_fields=True):
    """What the `auditor` signs: it has computed this leg again with the file of that digest, and
    got what `report` says."""

    auditor: NodeId
    peer: NodeId
    request_id: RequestId
    leg: int
    choice: int
    model_digest: Digest
    proof: SignedProof
    found_at: Time
    why: Annotated[str, Meta(max_length=1000)]
    report: dict[str, Any]
    v: Literal[1] = 1


class Evidence(Struct, frozen=True, forbid_unknown_fields=True):
    """The document.  `signed` is the text of a Disproof under `signature` (hex)."""

    signed: str
    signature: Annotated[str, Meta(pattern=SIGNATURE)]
    receipt: ReceiptView | None = None
    transcript: RequestTranscript | None = None
    object: Literal["disproof"] = "disproof"


def sign(identity: Identity, disproof: Disproof) -> tuple[bytes, bytes]:
    """The signed bytes and the 64-byte signature."""
    signed = canonical(disproof)
    return signed, identity.sign(DOMAIN, signed)


def verify_evidence(document: bytes) -> list[VerificationCheck]:
    """Check all that can be checked without computing; stops at the first check without which the
    others mean nothing."""
    try:
        evidence = msgspec.json.decode(document, type=Evidence)
        disproof = msgspec.json.decode(evidence.signed, type=Disproof)
        proof = read_proof(disproof.proof)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return [VerificationCheck("format", False, f"this is no evidence: {error}")]
    checks: list[VerificationCheck] = []
    for check in _checks(evidence, disproof, proof):
        checks.append(check)
        if not check.ok:
            break
    return checks


def _checks(evidence: Evidence, disproof: Disproof, proof: Proof) -> Iterator[VerificationCheck]:
    signature = bytes.fromhex(evidence.signature)
    yield VerificationCheck(
        "auditor",
        verify(disproof.auditor, DOMAIN, evidence.signed.encode(), signature),
        f"{disproof.auditor} signed that it computed the leg again and that {disproof.why}",
    )
    yield VerificationCheck(
        "proof",
        is_signed(proof, disproof.proof) and proof.witness is None and _is_of(proof, disproof),
        f"{disproof.peer} signed the proof of this leg, of the file {disproof.model_digest}",
    )
    yield VerificationCheck(
        "promise",
        bool(proof.exact_on),
        f"the proof promises the same bits to whoever computes it again: {proof.exact_on or 'no'}",
    )
    yield _transcript(evidence, disproof, proof)


def _is_of(proof: Proof, disproof: Disproof) -> bool:
    return (proof.node_id, proof.request_id, proof.leg, proof.choice, proof.model_digest) == (
        disproof.peer,
        disproof.request_id,
        disproof.leg,
        disproof.choice,
        disproof.model_digest,
    )


def _transcript(evidence: Evidence, disproof: Disproof, proof: Proof) -> VerificationCheck:
    name = "transcript"
    if evidence.receipt is None or evidence.transcript is None:
        return VerificationCheck(
            name, True, "there is none here: so far this is the auditor's word against the peer's"
        )
    try:
        why = _mismatch(evidence.receipt, evidence.transcript, disproof.proof, proof)
    except (ValueError, KeyError, TypeError) as error:
        why = f"the receipt cannot be read: {error}"
    meaning = "prompt and output are what the peer committed to: compute them again to be sure"
    return VerificationCheck(name, not why, why or meaning)


def _mismatch(
    view: ReceiptView, transcript: RequestTranscript, signed: SignedProof, proof: Proof
) -> str:
    """Raises ValueError."""
    receipt = msgspec.json.decode(view.signed_receipt)
    proofs = [msgspec.convert(one, SignedProof) for one in receipt["proofs"]]
    if signed not in proofs:
        return "the receipt does not have this proof"
    openings = openings_of(view.opening or {}, [read_statement(one) for one in proofs])
    return mismatch(transcript, proof, *openings[proofs.index(signed)])
