"""The end of a request: its proofs are signed, and its receipt is written with its usage."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import UNSET

from pinaivu_box import amount
from pinaivu_box.gateway import transcripts
from pinaivu_box.gateway.backend import asked_text
from pinaivu_box.gateway.records import LegRecord, RequestRecord
from pinaivu_box.identity import Identity, verify
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    EXACT_VERSION,
    MARK_DOMAIN,
    UPSTREAM_VERSION,
    VERSION,
    LegStatement,
    Price,
    Proof,
    Receipt,
    SignedProof,
    TokenUsage,
    UpstreamLeg,
    mark_text,
    sampling_record,
    sign_proof,
    sign_receipt,
    sign_upstream_leg,
    total_cost,
)
from pinaivu_box.settings import LiveSettings
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key
from pinaivu_box.store.requests import RequestRow, StoredReceipt, store_request
from pinaivu_box.text import utc_text


class Meter:
    def __init__(self, identity: Identity, database: Database, settings: LiveSettings) -> None:
        self._settings = settings
        self._identity = identity
        self._database = database

    @property
    def node_id(self) -> str:
        return self._identity.node_id

    async def record(self, record: RequestRecord, finish_reason: str, key: Key) -> None:
        """Sign and write; returns when usage, receipt, the transcript (if one is kept) and the
        key's counters are on disk."""
        total_ms, job, last = record.elapsed_ms(), record.job, record.served[-1].started
        price = Price.of(record.prices, self._settings.config.pricing.currency)
        prompts = [
            commitment.commit(asked_text(leg.job), _prompt_tokens(leg), leg.job.nonce)
            for leg in record.prompts
        ]
        proofs, openings = await self._prove(record, price)
        on_boxes = [leg for leg in record.served if leg.started.upstream is None]
        has_upstream = len(on_boxes) < len(record.served)
        tokens = [token for choice in record.choices for token in choice.tokens]
        text = commitment.output_text([choice.text for choice in record.choices])
        extras = [choice.extras for choice in record.choices]
        output, opened = commitment.commit(
            text, None if has_upstream else tokens, commitment.new_nonce(), extras
        )
        record.cost = total_cost([proof for proof, _ in proofs], price)
        receipt = Receipt(
            request_id=job.request_id,
            timestamp=utc_text(record.created),
            coordinator_id=self._identity.node_id,
            node_id=last.node_id,
            model=job.model.id,
            model_digest=(on_boxes or record.served)[-1].started.model_digest,
            payment_amount=amount.to_text(record.cost),
            currency=price.currency,
            finish_reason=finish_reason,
            routing=_routing(record),
            proofs=[signed for _, signed in proofs],
            prompt_commitment=commitment.of_several([prompt for prompt, _ in prompts]),
            output_commitment=output,
            usage=TokenUsage(record.prompt_tokens, record.completion_tokens, record.cached_tokens),
            price=price,
            v=UPSTREAM_VERSION if has_upstream else VERSION,
        )
        signed, signature = sign_receipt(self._identity, receipt)
        opening: dict[str, Any] = {"prompt": prompts[0][1], "output": opened, "legs": openings}
        if len(prompts) > 1:
            opening["prompts"] = [prompt_opening for _, prompt_opening in prompts]
        if job.usual_stop:  # which the owner does not know, and the commitment covers
            opening["stop"] = job.stop
        await store_request(
            self._database,
            _row(record, receipt, total_ms),
            StoredReceipt(signed, signature, msgspec.json.encode(opening)),
            record.period,
            transcripts.to_store(record, key, self._settings.config.receipts.transcripts),
        )

    async def _prove(
        self, record: RequestRecord, price: Price
    ) -> tuple[list[tuple[LegStatement, SignedProof]], list[commitment.Opening]]:
        proofs: list[tuple[LegStatement, SignedProof]] = []
        openings: list[commitment.Opening] = []
        for leg in record.served:
            await asyncio.sleep(0)  # there may be many, each of a long prompt: others go between
            if leg.proved is not None:
                proofs.append((leg.proved.proof, leg.proved.signed))
                openings.append(leg.proved.opening)
                continue
            if leg.started.upstream is not None:
                statement, opening = upstream_leg(leg, price)
                proofs.append((statement, sign_upstream_leg(self._identity, statement)))
                openings.append(opening)
                continue
            # Of a peer that was lost: its price is not known to be owed, nor its word given.
            proof, opening = prove(leg, price)
            if leg.started.node_id != self._identity.node_id:
                mark = leg.mark if _is_mark(proof, leg.mark) else None
                proof = msgspec.structs.replace(proof, witness=self._identity.node_id, mark=mark)
            proofs.append((proof, sign_proof(self._identity, proof)))
            openings.append(opening)
        return proofs, openings


def _row(record: RequestRecord, receipt: Receipt, total_ms: int) -> RequestRow:
    return RequestRow(
        request_id=receipt.request_id,
        key_id=record.key_id,
        created_at=int(record.created * 1000),
        model=receipt.model,
        node_id=receipt.node_id,
        finish_reason=receipt.finish_reason,
        prompt_tokens=receipt.usage.prompt_tokens,
        cached_tokens=receipt.usage.cached_tokens,
        completion_tokens=receipt.usage.completion_tokens,
        amount=record.cost,
        queue_ms=record.queue_ms,
        ttft_ms=record.ttft_ms,
        total_ms=total_ms,
    )


def prove(leg: LegRecord, price: Price) -> tuple[Proof, commitment.Opening]:
    """What there is to sign of a leg."""
    job = leg.job
    prompt, _ = commitment.commit(asked_text(job), leg.prompt or [], job.nonce)
    nonce = leg.started.nonce or commitment.new_nonce()
    text = "".join(leg.text)
    extras = [leg.extras] if leg.started.proof > 1 else []
    output, opening = commitment.commit(text, leg.tokens, nonce, extras)
    # Of a leg that was lost nobody here knows the numbers.
    numbers = leg.numbers if leg.started.exactness else None
    proof = Proof(
        request_id=job.request_id,
        leg=job.leg,
        choice=job.choice,
        prompt=job.prompt_number,
        node_id=leg.started.node_id,
        model=job.model.id,
        model_digest=leg.started.model_digest,
        engine=leg.started.engine,
        sampling=sampling_record(leg.started.sampling, job.max_tokens),
        prompt_commitment=prompt,
        output_commitment=output,
        prompt_tokens=len(leg.prompt or []),
        completion_tokens=len(leg.tokens),
        cached_tokens=leg.cached_tokens,
        shifted_tokens=leg.shifted_tokens,
        finish_reason=leg.finish_reason,
        started_at=utc_text(leg.started_at),
        ttft_ms=leg.ttft_ms,
        duration_ms=leg.duration_ms,
        price=price,
        v=leg.started.proof if numbers is None else EXACT_VERSION,
        exactness=UNSET if numbers is None else leg.started.exactness,
        logits_sha256=UNSET if numbers is None else numbers.hex(),
    )
    return proof, opening


def upstream_leg(leg: LegRecord, price: Price) -> tuple[UpstreamLeg, commitment.Opening]:
    """What there is to sign of a leg that an upstream has made."""
    job, started, counted = leg.job, leg.started, leg.counted
    assert started.upstream is not None and counted is not None
    prompt, _ = commitment.commit(asked_text(job), None, job.nonce)
    nonce = started.nonce or commitment.new_nonce()
    output, opening = commitment.commit("".join(leg.text), None, nonce, [leg.extras])
    statement = UpstreamLeg(
        request_id=job.request_id,
        leg=job.leg,
        choice=job.choice,
        prompt=job.prompt_number,
        node_id=started.node_id,
        model=job.model.id,
        upstream=started.upstream.upstream,
        upstream_model=started.upstream.model,
        sampling=started.sent,
        prompt_commitment=prompt,
        output_commitment=output,
        prompt_tokens=counted.prompt,
        completion_tokens=counted.completion,
        cached_tokens=counted.cached,
        tokens_counted_by="estimate" if counted.estimated else "upstream",
        finish_reason=leg.finish_reason,
        started_at=utc_text(leg.started_at),
        ttft_ms=leg.ttft_ms,
        duration_ms=leg.duration_ms,
        price=price,
    )
    return statement, opening


def _prompt_tokens(leg: LegRecord) -> list[int] | None:
    """None if they are not known, at an upstream."""
    return None if leg.started.upstream is not None else leg.prompt or []


def _is_mark(proof: Proof, mark: str | None) -> bool:
    """Whether the node has signed that much."""
    text = mark_text(
        proof.request_id, proof.choice, proof.leg, proof.completion_tokens, proof.output_commitment
    )
    return mark is not None and verify(proof.node_id, MARK_DOMAIN, text, bytes.fromhex(mark))


def _routing(record: RequestRecord) -> dict[str, Any]:
    """How the first leg found its node; of the others, where they went and why."""
    first, *others = record.served
    route = first.route or {"policy": "local", "chosen": first.started.node_id}
    legs = [leg.route for leg in others if leg.route]
    return {**route, "legs": legs} if legs else route
