"""A receipt as the explorer shows it: without openings and names of keys, and to the public without
what it says of other boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from pinaivu_box.amount import to_text
from pinaivu_box.receipts.receipt import (
    LegStatement,
    Proof,
    Receipt,
    ReceiptView,
    TokenUsage,
    UpstreamLeg,
    view,
)
from pinaivu_box.receipts.verify import read_statement, verify_receipt
from pinaivu_box.server.explorer_boxes import NamedBox
from pinaivu_box.server.explorer_log import LogEntryView, log_entry
from pinaivu_box.store.requests import StoredReceipt

WITHHELD = (
    "What was signed also says what other boxes ask for and how they scored, so it is shown to the "
    "account that made the request, and not to everybody. Whoever has the receipt as a file can "
    "verify it on this page."
)
_WHY = {
    "local": "The box that was asked prefers itself, and could begin at once.",
    "warm": "It had served this conversation before, and could begin at once.",
    "best": "It had the best score of all that could serve the request.",
    "two-choices": "Of the best, two were drawn, and it had the larger share of its places free.",
}
_ALONE = "The box that was asked served it itself."
_ONLY = "It was the only one that could serve the request."


class CandidateView(Struct, frozen=True, omit_defaults=True):
    """Who was compared: with a score from 0 to 1, the cost in the receipt's currency and the time
    that was expected until the first token, or why it could not serve the request."""

    box: NamedBox
    score: float | None = None
    cost: str | None = None
    expected_ms: int | None = None
    why_not: str | None = None


class RouteView(Struct, frozen=True, omit_defaults=True):
    """How the first leg found its box (`chosen`).  To the public there are no candidates."""

    policy: str
    why: str
    chosen: NamedBox
    eligible: int | None = None
    candidates: list[CandidateView] = []


class ProofView(Struct, frozen=True, omit_defaults=True):
    """One leg.  `kind`: "box" (its proof), "lost" (a box that was lost, of which the coordinator
    says this), "upstream" (another server, of which it says this)."""

    kind: Literal["box", "lost", "upstream"]
    box: NamedBox
    choice: int
    leg: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    started_at: str
    ttft_ms: int | None
    duration_ms: int
    finish_reason: str
    device: str = ""
    build: str = ""
    upstream: str = ""


class CheckName(Struct, frozen=True):
    name: str
    ok: bool


class ExplorerReceipt(Struct, frozen=True, kw_only=True):
    """`receipt` is what was signed, as `GET /v1/receipts/{request_id}` returns it, without the
    opening; null where the visitor may not see it, which `withheld` explains.  `checks`: what this
    box finds when it verifies the receipt; a browser verifies it itself.  `log`: where the receipt
    is in this box's log, null if it is not."""

    object: str = "explorer.receipt"
    request_id: str
    timestamp: str
    model: str
    model_digest: str
    coordinator: NamedBox
    node: NamedBox
    payment_amount: str
    currency: str
    usage: TokenUsage
    finish_reason: str
    version: int
    route: RouteView
    proofs: list[ProofView]
    checks: list[CheckName]
    receipt: ReceiptView | None
    withheld: str | None = None
    log: LogEntryView | None = None


def explorer_receipt(
    stored: StoredReceipt, names: Mapping[str, str], *, public: bool, inclusion: str | None = None
) -> ExplorerReceipt:
    """`names` of boxes by node id, as far as the visitor may know them; `inclusion` is the proof
    that the log has the receipt."""
    receipt = msgspec.json.decode(stored.signed, type=Receipt)
    statements = [read_statement(signed) for signed in receipt.proofs]
    whole = view(stored.signed, stored.signature, None, inclusion)
    checks = verify_receipt(msgspec.json.encode(whole))
    hidden = public and _tells_of_others(receipt, statements)

    def box(node_id: str) -> NamedBox:
        return NamedBox(node_id, names.get(node_id, ""))

    route = receipt.routing
    return ExplorerReceipt(
        request_id=receipt.request_id,
        timestamp=receipt.timestamp,
        model=receipt.model,
        model_digest=receipt.model_digest,
        coordinator=box(receipt.coordinator_id),
        node=box(receipt.node_id),
        payment_amount=receipt.payment_amount,
        currency=receipt.currency,
        usage=receipt.usage,
        finish_reason=receipt.finish_reason,
        version=receipt.v,
        route=RouteView(
            policy=str(route.get("policy", "")),
            why=_why(route),
            chosen=box(str(route.get("chosen", receipt.node_id))),
            eligible=None if public else route.get("eligible"),
            candidates=[]
            if public
            else [_candidate(each, box(each["node_id"])) for each in route.get("candidates", [])],
        ),
        proofs=[
            _proof(statement, box(statement.node_id), public=public) for statement in statements
        ],
        checks=[CheckName(check.name, check.ok) for check in checks],
        receipt=None if hidden else whole,
        withheld=WITHHELD if hidden else None,
        log=log_entry(inclusion, box),
    )


def _tells_of_others(receipt: Receipt, statements: list[LegStatement]) -> bool:
    """Whether the signed text has prices or scores of other boxes and upstreams, or why they could
    not serve the request."""
    own = receipt.coordinator_id
    routes: list[dict[str, Any]] = [receipt.routing, *receipt.routing.get("legs", [])]
    return any(
        isinstance(statement, UpstreamLeg) or statement.node_id != own for statement in statements
    ) or any(
        route.get("left_out") or any(each["node_id"] != own for each in route.get("candidates", []))
        for route in routes
    )


def _why(route: Mapping[str, Any]) -> str:
    if "reason" not in route:
        return _ALONE
    if route["reason"] != "local" and route.get("eligible") == 1:
        return _ONLY
    return _WHY.get(route["reason"], "")


def _candidate(record: Mapping[str, Any], box: NamedBox) -> CandidateView:
    if "why_not" in record:
        return CandidateView(box, why_not=record["why_not"])
    cost = to_text(int(record["cost"]))
    return CandidateView(box, record["score"], cost, record["expected_ms"])


def _proof(statement: LegStatement, box: NamedBox, *, public: bool) -> ProofView:
    is_proof = isinstance(statement, Proof)
    lost = isinstance(statement, Proof) and statement.witness is not None
    engine = statement.engine if isinstance(statement, Proof) else None
    upstream = statement.upstream if isinstance(statement, UpstreamLeg) else ""
    return ProofView(
        kind="lost" if lost else "box" if is_proof else "upstream",
        box=box,
        choice=statement.choice,
        leg=statement.leg,
        prompt_tokens=statement.prompt_tokens,
        cached_tokens=statement.cached_tokens,
        completion_tokens=statement.completion_tokens,
        started_at=statement.started_at,
        ttft_ms=statement.ttft_ms,
        duration_ms=statement.duration_ms,
        finish_reason=statement.finish_reason,
        device=engine.device if engine else "",
        build=engine.build if engine else "",
        upstream="" if public else upstream,
    )
