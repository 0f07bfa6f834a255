"""Proofs of inference and receipts: what is signed, by whom, over which bytes.

Both are canonical JSON (RFC 8785) signed with Ed25519 over a domain, a newline and the bytes.  The
bytes are kept and served as they were signed; nobody re-serialises them before verifying.

`v` is the version of what is said, in a proof and in a receipt: in 2, the commitment to the output
also covers log-probabilities and vectors (`commitment`).  Boxes of either version work together:
the box that asks names the highest version that it reads, and gets proofs of that or a lower one.
To add a field, raise `VERSION`, keep the old one in `VERSIONS`, and leave the field out of what is
signed in the versions before it, as `sampling_record` does with `min_tokens`.

Version 3 is for receipts with a leg that an upstream has made: there is no proof of it, only the
statement (`UpstreamLeg`) of the box that asked in the proof's place, and nothing commits to token
ids.  Receipts without such a leg are of version 2, and proofs are never of version 3.

A proof of version 4 is one of version 2 with `exactness` and `logits_sha256`: it commits to the
numbers that the output was drawn from.  It is in receipts of version 2 or 3, and only boxes get it
that read it.  A leg without draws, or one whose engine or box was lost, has a proof of version 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import rfc8785
from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.amount import Prices
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.identity import Identity
from pinaivu_box.text import DIGEST, NAME, NO_CONTROLS, NODE_ID, SIGNATURE, TIME, whole

PROOF_DOMAIN = "pinaivu/proof/v1"
MARK_DOMAIN = "pinaivu/mark/v1"
RECEIPT_DOMAIN = "pinaivu/receipt/v1"
ACCEPTANCE_DOMAIN = "pinaivu/acceptance/v1"  # a coordinator's, over the bytes of a proof
UPSTREAM_DOMAIN = "pinaivu/upstream/v1"  # over a statement about an upstream
VERSION = 2
EXACT_VERSION = 4  # of proofs with `exactness` and `logits_sha256`
BITWISE = "bitwise:"  # begins an exactness that says on which engines the bits are the same
STATISTICAL = "statistical"  # the exactness of which nothing is promised
VERSIONS = (1, VERSION, EXACT_VERSION)  # that are read, of proofs
UPSTREAM_VERSION: Literal[3] = (
    3  # of receipts with legs of upstreams, and of the statements about these
)
RECEIPT_VERSIONS = (1, VERSION, UPSTREAM_VERSION)  # that are read
UpstreamKind = Literal["upstream, not executed by a box"]
NOT_A_BOX: UpstreamKind = "upstream, not executed by a box"

# Everything that is signed is read back by these: nothing is signed or stored that they refuse.
RequestId = Annotated[str, Meta(pattern=whole("req_[0-9a-z_]{1,60}"))]
NodeId = Annotated[str, Meta(pattern=NODE_ID)]
Digest = Annotated[str, Meta(pattern=DIGEST)]
Name = Annotated[str, Meta(max_length=256, pattern=NAME)]
Shown = Annotated[str, Meta(max_length=256, pattern=NO_CONTROLS)]
Time = Annotated[str, Meta(pattern=TIME)]
Milliseconds = Annotated[int, Meta(ge=0, lt=2**53)]
Tokens = Annotated[int, Meta(gt=-(2**53), lt=2**53)]  # none is negative, which `verify` says
TokensFrom0 = Annotated[int, Meta(ge=0, lt=2**53)]


class EngineBuild(Struct, frozen=True, forbid_unknown_fields=True):
    build: Shown
    device: Shown


class Price(Struct, frozen=True, forbid_unknown_fields=True):
    """Of 1,000 tokens: computed prompt tokens, cached prompt tokens, and completion tokens."""

    currency: Shown
    prompt: str
    cached: str
    completion: str

    @classmethod
    def of(cls, prices: Prices, currency: str) -> Price:
        cached = prices.prompt if prices.cached is None else prices.cached
        return cls(currency, prices.prompt, cached, prices.completion)

    @property
    def prices(self) -> Prices:
        return Prices(self.prompt, self.completion, self.cached)


class Proof(Struct, frozen=True, forbid_unknown_fields=True):
    """What the serving node signs of one leg.  Milliseconds; commitments and digest in hex.

    `leg` numbers those of one choice.  `cached_tokens` of the prompt were not computed anew;
    `shifted_tokens` were forgotten on the way (context shift).  `sampling` holds every parameter
    that decided the draws; its seed is text, because JSON numbers do not carry 64 bits.  `choice`
    says which of several answers it made, and `prompt` which of several prompts it answered.

    With the `exactness` "bitwise:" and on what, the node says that its engine gives the same bits
    for the same tokens whatever else it computes, as does any other engine of that exactness with
    the same file; with "statistical", or without it, an audit is statistical.  `logits_sha256` is
    over the leg's tokens and their logits as the model gave them (`engine.numbers_digest`).

    A node that was lost in the middle signs no proof: `witness`, the coordinator, then signs what
    it has received, and `mark` is the node's own signature over that much of it (`mark_text`).
    """

    request_id: RequestId
    leg: int
    node_id: NodeId
    model: Name
    model_digest: Digest
    engine: EngineBuild
    sampling: dict[str, Any]
    prompt_commitment: Digest
    output_commitment: Digest
    prompt_tokens: Tokens
    completion_tokens: Tokens
    cached_tokens: Tokens
    shifted_tokens: int
    finish_reason: Name
    started_at: Time
    ttft_ms: Milliseconds | None
    duration_ms: Milliseconds
    price: Price
    choice: int = 0
    prompt: int = 0
    witness: NodeId | None = None
    mark: Annotated[str, Meta(pattern=SIGNATURE)] | None = None
    v: int = VERSION
    exactness: Name | UnsetType = UNSET
    logits_sha256: Digest | UnsetType = UNSET

    @property
    def signer(self) -> str:
        return self.witness or self.node_id

    @property
    def is_known(self) -> bool:
        """Whether its version is, and has its fields."""
        fields = (self.exactness, self.logits_sha256)
        return self.v in VERSIONS and all(
            (field is UNSET) == (self.v != EXACT_VERSION) for field in fields
        )

    @property
    def exact_on(self) -> str:
        """On which engines the bits are the same; empty if none are promised to be."""
        exactness = "" if self.exactness is UNSET else self.exactness
        return exactness if exactness.startswith(BITWISE) else ""

    def fits(self, receipt_version: int) -> bool:
        """Whether a receipt of that version may have it."""
        return min(self.v, VERSION) <= receipt_version


class UpstreamLeg(Struct, frozen=True, forbid_unknown_fields=True):
    """What the box `node_id` signs of one leg that another server than a box has made: the
    `upstream` of that name in its configuration, which knows the model as `upstream_model`.

    That box is the coordinator, or a peer that asked its own upstream; if that peer was lost in the
    middle, the coordinator signs.  Nobody proves what ran there.  `tokens_counted_by` says whose
    number of tokens is billed, the upstream's or a box's own estimate, and `sampling` holds the
    parameters that were sent.  The other fields are as in `Proof`.
    """

    request_id: RequestId
    leg: int
    node_id: NodeId
    model: Name
    upstream: Name
    upstream_model: Shown
    sampling: dict[str, Any]
    prompt_commitment: Digest
    output_commitment: Digest
    prompt_tokens: TokensFrom0
    completion_tokens: TokensFrom0
    cached_tokens: TokensFrom0
    tokens_counted_by: Literal["upstream", "estimate"]
    finish_reason: Name
    started_at: Time
    ttft_ms: Milliseconds | None
    duration_ms: Milliseconds
    price: Price
    choice: int = 0
    prompt: int = 0
    kind: UpstreamKind = NOT_A_BOX
    v: Literal[3] = UPSTREAM_VERSION

    @property
    def signer(self) -> str:
        return self.node_id


LegStatement = Proof | UpstreamLeg


class SignedProof(Struct, frozen=True, forbid_unknown_fields=True):
    """`signed` is the text that the signature (hex) covers: of a Proof, or of an UpstreamLeg."""

    signed: str
    signature: str


class TokenUsage(Struct, frozen=True, forbid_unknown_fields=True):
    prompt_tokens: Tokens
    completion_tokens: Tokens
    cached_tokens: Tokens


class Receipt(Struct, frozen=True, forbid_unknown_fields=True):
    """What the coordinator signs of the whole request; `node_id` served (the last leg of) it.

    `price` is what its client pays.  What a node that served for it is owed is in its proof.
    Of an upstream, `node_id` is the box that asked it, and `model_digest` (unless another leg ran
    on a box) stands for the name of the model (`upstream_digest`).
    """

    request_id: RequestId
    timestamp: Time
    coordinator_id: NodeId
    node_id: NodeId
    model: Name
    model_digest: Digest
    payment_amount: str
    currency: Shown
    finish_reason: Name
    routing: dict[str, Any]
    proofs: list[SignedProof]
    prompt_commitment: Digest
    output_commitment: Digest
    usage: TokenUsage
    price: Price | None = None
    v: int = VERSION


class DocumentedFields(Struct, frozen=True):
    """Fields of the receipt that the API's view shows beside the signed bytes."""

    request_id: str
    node_id: str
    model: str
    timestamp: str
    payment_amount: str


class ReceiptView(DocumentedFields, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The API's view: the documented fields, and the bytes that were signed.

    `opening` (see `receipts.commitment`) is there for the owner of the key only.  `inclusion`, once
    there is one, is the proof that the coordinator's log has the receipt (`log.entry_proof`).
    """

    coordinator_signature: str
    signed_receipt: str
    object: str = "receipt"
    opening: dict[str, Any] | None = None
    inclusion: str | None = None


def sampling_record(sampling: Sampling, max_tokens: int | None) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(sampling)
    if not sampling.min_tokens:  # boxes that do not know it refuse a record with it
        del record["min_tokens"]
    return {**record, "seed": str(sampling.seed), "max_tokens": max_tokens}


def canonical(value: Struct) -> bytes:
    """RFC 8785 JSON of a struct."""
    return rfc8785.dumps(msgspec.to_builtins(value))


def sign_proof(identity: Identity, proof: Proof) -> SignedProof:
    signed = canonical(proof)
    return SignedProof(signed.decode(), identity.sign(PROOF_DOMAIN, signed).hex())


def sign_upstream_leg(identity: Identity, leg: UpstreamLeg) -> SignedProof:
    signed = canonical(leg)
    return SignedProof(signed.decode(), identity.sign(UPSTREAM_DOMAIN, signed).hex())


def upstream_digest(model_id: str) -> str:
    """In place of a file's digest, for a model that no box has: of its name."""
    return hashlib.sha256(f"{UPSTREAM_DOMAIN}\n{model_id}".encode()).hexdigest()


def sign_receipt(identity: Identity, receipt: Receipt) -> tuple[bytes, bytes]:
    """The signed bytes and the 64-byte signature."""
    signed = canonical(receipt)
    return signed, identity.sign(RECEIPT_DOMAIN, signed)


def view(
    signed: bytes, signature: bytes, opening: bytes | None, inclusion: str | None = None
) -> ReceiptView:
    """The view of a stored receipt, unchecked: `verify` checks it."""
    documented = msgspec.json.decode(signed, type=DocumentedFields)
    return ReceiptView(
        **msgspec.structs.asdict(documented),
        coordinator_signature=signature.hex(),
        signed_receipt=signed.decode(),
        opening=None if opening is None else msgspec.json.decode(opening),
        inclusion=inclusion,
    )


def prompts_of(proofs: Sequence[LegStatement]) -> list[LegStatement]:
    """The first proof of each prompt: a prompt is paid once."""
    first: dict[int, LegStatement] = {}
    for proof in proofs:
        first.setdefault(proof.prompt, proof)
    return list(first.values())


def total_tokens(proofs: Sequence[LegStatement]) -> int:
    """Tokens that are paid for: each prompt once, and the completion tokens of every leg."""
    completion = sum(proof.completion_tokens for proof in proofs)
    return completion + sum(proof.prompt_tokens for proof in prompts_of(proofs))


def total_cost(proofs: Sequence[LegStatement], price: Price | None = None) -> int:
    """The cost of these tokens in 10^-9 of the currency: at `price`, or each leg's at its own.

    Raises ValueError if a price is none.
    """
    prompts = prompts_of(proofs)
    return sum(cost(proof, proof in prompts, price) for proof in proofs)


def cost(proof: LegStatement, pays_prompt: bool, price: Price | None = None) -> int:
    """The cost of one leg in 10^-9 of the currency.  Raises ValueError."""
    prices = (price or proof.price).prices
    prompt = (proof.prompt_tokens, proof.cached_tokens) if pays_prompt else (0, 0)
    return prices.cost(*prompt, proof.completion_tokens)


def mark_text(request_id: str, choice: int, leg: int, tokens: int, commitment: str) -> bytes:
    """What a serving node signs with each piece of output: the commitment to all of the leg."""
    return f"{request_id} {choice} {leg} {tokens} {commitment}".encode()
