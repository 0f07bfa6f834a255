"""Offline verification of a receipt: numbered checks, each saying what it proves.

Pure: no server, no database, no clock.  A signature says who claimed what; it does not say that
the claim is true.  Whether a node ran the model it names is a matter for an audit.
"""

from __future__ import annotations

import re
from collections import Counter

import msgspec
from msgspec import Struct

from pinaivu_box import amount
from pinaivu_box.identity import NODE_PREFIX, verify
from pinaivu_box.receipts import commitment, strict_json
from pinaivu_box.receipts.checks import VerificationCheck, either
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    NOT_A_BOX,
    PROOF_DOMAIN,
    RECEIPT_DOMAIN,
    RECEIPT_VERSIONS,
    UPSTREAM_DOMAIN,
    UPSTREAM_VERSION,
    VERSIONS,
    DocumentedFields,
    LegStatement,
    Proof,
    Receipt,
    ReceiptView,
    SignedProof,
    UpstreamLeg,
    mark_text,
    prompts_of,
    total_cost,
    total_tokens,
)
from pinaivu_box.receipts.verify_inclusion import LogPolicy, log_checks
from pinaivu_box.receipts.verify_transcript import Transcript, transcript_checks

__all__ = [
    "LogPolicy",
    "Transcript",
    "VerificationCheck",
    "is_signed",
    "read_proof",
    "read_statement",
    "verify_receipt",
]

_KNOWN = ", ".join(map(str, VERSIONS))
_KNOWN_RECEIPTS = ", ".join(map(str, RECEIPT_VERSIONS))
_HEX = re.compile("[0-9a-f]*")


def verify_receipt(
    document: bytes,
    *,
    node_key: str | None = None,
    log: LogPolicy | None = None,
    transcript: Transcript | None = None,
) -> list[VerificationCheck]:
    """Check a receipt as `GET /v1/receipts/{id}` serves it.

    `node_key`: the public key (64 hex digits, with or without `node_`) that the verifier trusts as
    the coordinator's.  `log`: what it asks of the log and its witnesses.  Stops after the first
    check without which the rest mean nothing.
    """
    checks: list[VerificationCheck] = []
    try:
        strict_json.parse(document.decode())
        view = msgspec.json.decode(document, type=ReceiptView)
        _check_opening(view)
        strict_json.parse(view.signed_receipt)
        receipt = msgspec.json.decode(view.signed_receipt, type=Receipt)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return [VerificationCheck("format", False, f"this is not a receipt: {error}")]
    checks.append(_format(receipt))
    checks.append(_coordinator(view, receipt))
    if not all(check.ok for check in checks):
        return checks
    checks.append(_shown_fields(view, receipt))
    checked = [_proof(number, signed, receipt) for number, signed in enumerate(receipt.proofs)]
    checks += [check for check, _ in checked]
    proofs = [proof for _, proof in checked if proof is not None]
    whole = len(proofs) == len(checked)
    if whole:
        checks += [_order(receipt, proofs), _usage(receipt, proofs)]
        if proofs:
            checks.append(_payment(receipt, proofs))
    checks += log_checks(view, receipt, log or LogPolicy())
    if node_key is not None:
        checks.append(_trusted(receipt, node_key))
    if transcript is not None:
        checks += transcript_checks(view, receipt, proofs if whole else [], transcript)
    return checks


class _Kind(Struct):
    kind: str | None = None


def read_statement(signed: SignedProof) -> LegStatement:
    """Parse the text of a proof, or of the statement that is there of an upstream's leg;
    `is_signed` checks its signature.  Raises ValueError.

    What another box has signed is read with these two before anything is signed, billed or stored:
    what they refuse would be in a receipt that cannot be verified.
    """
    try:
        strict_json.parse(signed.signed)
        if msgspec.json.decode(signed.signed, type=_Kind).kind is None:
            return msgspec.json.decode(signed.signed, type=Proof)
        return msgspec.json.decode(signed.signed, type=UpstreamLeg)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_proof(signed: SignedProof) -> Proof:
    """Parse the text of a proof; `is_signed` checks its signature.  Raises ValueError."""
    try:
        strict_json.parse(signed.signed)
        return msgspec.json.decode(signed.signed, type=Proof)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_signed(statement: LegStatement, signed: SignedProof) -> bool:
    """Whether the signer of this statement, as read from `signed`, has signed every byte of it."""
    return _is_signed_by(statement.signer, statement, signed)


def _is_signed_by(signer: str, statement: LegStatement, signed: SignedProof) -> bool:
    domain = PROOF_DOMAIN if isinstance(statement, Proof) else UPSTREAM_DOMAIN
    return verify(signer, domain, signed.signed.encode(), _hex(signed.signature))


def _check_opening(view: ReceiptView) -> None:
    """Raises ValueError if there is anything in it but what opens commitments."""
    if view.object != "receipt":
        raise ValueError("its `object` is not `receipt`")
    for name, value in (view.opening or {}).items():
        if name not in ("prompt", "output", "legs", "prompts", "stop"):
            raise ValueError(f"its opening contains unknown field `{name[:100]}`")
        for opening in value if isinstance(value, list) else [value]:
            for field in opening if isinstance(opening, dict) else ():
                if field not in commitment.Opening.__struct_fields__:
                    raise ValueError(f"its opening contains unknown field `{field[:100]}`")


def _format(receipt: Receipt) -> VerificationCheck:
    known = receipt.v in RECEIPT_VERSIONS
    unknown = "" if known else f"; {_KNOWN_RECEIPTS} are known"
    meaning = f"a receipt of version {receipt.v}{unknown}"
    return VerificationCheck("format", known, meaning)


def _coordinator(view: ReceiptView, receipt: Receipt) -> VerificationCheck:
    signature = _hex(view.coordinator_signature)
    ok = verify(receipt.coordinator_id, RECEIPT_DOMAIN, view.signed_receipt.encode(), signature)
    return either(
        "coordinator signature",
        ok,
        f"{receipt.coordinator_id} signed every byte of this receipt",
        f"the signature is not {receipt.coordinator_id}'s: the receipt was altered or forged",
    )


def _shown_fields(view: ReceiptView, receipt: Receipt) -> VerificationCheck:
    names = DocumentedFields.__struct_fields__
    different = [name for name in names if getattr(view, name) != getattr(receipt, name)]
    return either(
        "shown fields",
        not different,
        "the fields beside the signed receipt are the ones that were signed",
        f"{', '.join(different)} beside the signed receipt say something else than it does",
    )


def _proof(
    number: int, signed: SignedProof, receipt: Receipt
) -> tuple[VerificationCheck, LegStatement | None]:
    name = f"proof {number}"
    try:
        proof = read_statement(signed)
    except ValueError as error:
        return VerificationCheck(name, False, f"this is not a proof: {error}"), None
    if isinstance(proof, UpstreamLeg):
        why = _upstream_fault(proof, signed, receipt)
        check = either(f"leg {number}", not why, _said_of_upstream(proof, signed, receipt), why)
        return check, None if why else proof
    if not is_signed(proof, signed):
        return VerificationCheck(name, False, f"the signature is not {proof.signer}'s"), None
    if not proof.is_known or not proof.fits(receipt.v):
        why = f"a proof of version {proof.v} in a receipt of version {receipt.v}"
        return VerificationCheck(name, False, f"{why}; {_KNOWN} are known"), None
    for field in ("request_id", "model", "model_digest"):
        if (value := getattr(proof, field)) != getattr(receipt, field):
            return VerificationCheck(name, False, f"it is about another {field}: {value}"), None
    claim = (
        f"it ran {proof.model} (file sha256 {proof.model_digest}) and made "
        f"{proof.completion_tokens} tokens"
    )
    if proof.exact_on:
        claim += f", which can be made again to the bit ({proof.exact_on})"
    if proof.witness is not None:
        return _witnessed(name, proof, receipt, claim), proof
    return VerificationCheck(name, True, f"{proof.node_id} signed that {claim}"), proof


def _upstream_fault(leg: UpstreamLeg, signed: SignedProof, receipt: Receipt) -> str:
    """What is wrong with the statement about an upstream's leg; empty if nothing is."""
    signers = dict.fromkeys((leg.node_id, receipt.coordinator_id))
    if not any(_is_signed_by(signer, leg, signed) for signer in signers):
        return f"the signature is not {' or '.join(signers)}'s"
    if receipt.v != UPSTREAM_VERSION:
        return f"a leg of an upstream in a receipt of version {receipt.v}"
    for field in ("request_id", "model"):
        if (value := getattr(leg, field)) != getattr(receipt, field):
            return f"it is about another {field}: {value}"
    return ""


def _said_of_upstream(leg: UpstreamLeg, signed: SignedProof, receipt: Receipt) -> str:
    counted = "" if leg.tokens_counted_by == "upstream" else " (as it estimates)"
    lost = not is_signed(leg, signed)
    says = f"{leg.node_id} says that it"
    if lost:
        says = f"{receipt.coordinator_id} says that {leg.node_id}, which was lost before it signed,"
    return (
        f"{NOT_A_BOX}: {says} asked the upstream {leg.upstream} for "
        f"{leg.upstream_model} and got {leg.completion_tokens} tokens{counted}; nobody proves "
        "what ran there"
    )


def _witnessed(name: str, proof: Proof, receipt: Receipt, claim: str) -> VerificationCheck:
    """The check of a node that was lost: what it had sent by then."""
    if proof.witness != receipt.coordinator_id:
        return VerificationCheck(
            name, False, f"its witness {proof.witness} did not coordinate this request"
        )
    lost = f"{proof.node_id} was lost before its proof ({proof.finish_reason})"
    if proof.mark is None:
        return VerificationCheck(name, True, f"{lost}; the coordinator says that {claim}")
    text = mark_text(
        proof.request_id,
        proof.choice,
        proof.leg,
        proof.completion_tokens,
        proof.output_commitment,
    )
    ok = verify(proof.node_id, MARK_DOMAIN, text, _hex(proof.mark))
    mark = "it had signed the output by then" if ok else "the mark on its output is not its own"
    return VerificationCheck(name, ok, f"{lost}; {mark}; the coordinator says that {claim}")


def _order(receipt: Receipt, proofs: list[LegStatement]) -> VerificationCheck:
    """Every choice has legs 0, 1, 2, ..., and the prompts are those that were committed to: with
    their tokens by boxes, and without them for upstreams."""
    legs: Counter[int] = Counter()
    prompts: dict[int, str] = {}
    by_kind: dict[tuple[int, type], str] = {}
    whole = bool(proofs)
    for proof in proofs:
        whole &= proof.leg == legs[proof.choice]
        legs[proof.choice] += 1
        prompts.setdefault(proof.prompt, proof.prompt_commitment)
        first = by_kind.setdefault((proof.prompt, type(proof)), proof.prompt_commitment)
        whole &= first == proof.prompt_commitment
    together = commitment.of_several([prompts[number] for number in sorted(prompts)])
    whole &= together == receipt.prompt_commitment
    return either(
        "legs",
        whole,
        "the proofs are about the prompt of this receipt, and no leg of an answer is missing",
        "the proofs are about another prompt, or a leg of an answer is missing or doubled",
    )


def _usage(receipt: Receipt, proofs: list[LegStatement]) -> VerificationCheck:
    usage, prompts = receipt.usage, prompts_of(proofs)
    same = (
        bool(proofs)
        and all(proof.completion_tokens >= 0 for proof in proofs)
        and usage.prompt_tokens == sum(proof.prompt_tokens for proof in prompts)
        and usage.cached_tokens == sum(proof.cached_tokens for proof in prompts)
        and usage.prompt_tokens >= usage.cached_tokens >= 0
        and usage.prompt_tokens + usage.completion_tokens == total_tokens(proofs)
        and receipt.node_id == proofs[-1].node_id
    )
    return either(
        "usage",
        same,
        f"the tokens that were billed ({usage.prompt_tokens} prompt, {usage.completion_tokens} "
        f"completion) are the ones that {_signers(receipt, proofs)} signed for",
        "the receipt counts other tokens or names another node than its proofs do",
    )


def _signers(receipt: Receipt, proofs: list[LegStatement]) -> str:
    own = [isinstance(p, UpstreamLeg) and p.node_id == receipt.coordinator_id for p in proofs]
    if not any(own):
        return "the serving nodes"
    return "the coordinator" + " and the serving nodes" * (not all(own))


def _payment(receipt: Receipt, proofs: list[LegStatement]) -> VerificationCheck:
    price = receipt.price or proofs[-1].price
    try:
        due = amount.to_text(total_cost(proofs, receipt.price))
    except ValueError as error:
        return VerificationCheck("payment", False, f"the price is none: {error}")
    ok = due == receipt.payment_amount and price.currency == receipt.currency
    usage = receipt.usage
    sum_text = (
        f"{usage.prompt_tokens - usage.cached_tokens} prompt tokens at {price.prompt}, "
        f"{usage.cached_tokens} cached ones at {price.cached} and {usage.completion_tokens} "
        f"completion tokens at {price.completion} per 1,000"
    )
    return either(
        "payment",
        ok,
        f"{receipt.payment_amount} {receipt.currency} is the price of {sum_text}",
        f"{sum_text} cost {due} {price.currency}, the receipt says {receipt.payment_amount}",
    )


def _trusted(receipt: Receipt, node_key: str) -> VerificationCheck:
    expected = NODE_PREFIX + node_key.removeprefix(NODE_PREFIX).lower()
    ok = receipt.coordinator_id == expected
    return either(
        "trusted key",
        ok,
        "the signer is the box that you named",
        f"signed by {receipt.coordinator_id}, not by {expected}",
    )


def _hex(text: str) -> bytes:
    # One spelling only, or a receipt could be altered and still verify.
    return bytes.fromhex(text) if len(text) == 128 and _HEX.fullmatch(text) else b""
