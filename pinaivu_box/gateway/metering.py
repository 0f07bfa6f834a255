"""The account of a request: what it used, the proofs and the receipt, written in one go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pinaivu_box import amount
from pinaivu_box.config import PricingConfig
from pinaivu_box.gateway.backend import Job, Output, Prompt, Started
from pinaivu_box.identity import Identity
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    Price,
    Proof,
    Receipt,
    Usage,
    sampling_record,
    sign_proof,
    sign_receipt,
    total_tokens,
    utc_text,
)
from pinaivu_box.store.database import Database
from pinaivu_box.store.requests import RequestRow, StoredReceipt, settle

ENGINE_LOST = "engine_lost"  # finish reason of a leg whose engine died


@dataclass
class Leg:
    """What one node did.  `began` is monotonic, `started_at` Unix seconds."""

    started: Started
    began: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    prompt: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str = ENGINE_LOST
    ttft_ms: int | None = None
    duration_ms: int = 0
    cached_tokens: int = 0
    shifted_tokens: int = 0

    def take(self, event: Prompt | Output) -> None:
        if isinstance(event, Prompt):
            self.prompt = event.tokens
            return
        if event.tokens and self.ttft_ms is None:
            self.ttft_ms = self._elapsed_ms()
        self.tokens += event.tokens
        self.text.append(event.text)
        self.finish_reason = event.finish_reason or self.finish_reason
        self.duration_ms = self._elapsed_ms()
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        self.shifted_tokens = event.shifted_tokens

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


@dataclass
class Account:
    """Of one request, from its arrival to its receipt."""

    job: Job
    key_id: str
    created: float = field(default_factory=time.time)  # Unix seconds
    began: float = field(default_factory=time.monotonic)
    legs: list[Leg] = field(default_factory=list)
    queue_ms: int | None = None
    ttft_ms: int | None = None
    total_ms: int = 0

    def start_leg(self, started: Started) -> None:
        self.legs = [leg for leg in self.legs if leg.prompt is not None]
        self.legs.append(Leg(started))

    def take(self, event: Prompt | Output) -> None:
        self.legs[-1].take(event)
        if isinstance(event, Output):
            if event.queue_ms is not None and self.queue_ms is None:
                self.queue_ms = round(event.queue_ms)
            if event.tokens and self.ttft_ms is None:
                self.ttft_ms = self.elapsed_ms()

    @property
    def served(self) -> list[Leg]:
        """The legs in which a prompt was at least read: those that have a proof."""
        return [leg for leg in self.legs if leg.prompt is not None]

    @property
    def prompt_tokens(self) -> int:
        return len(self.served[0].prompt or []) if self.served else 0

    @property
    def cached_tokens(self) -> int:
        return self.served[0].cached_tokens if self.served else 0

    @property
    def shifted_tokens(self) -> int:
        return sum(leg.shifted_tokens for leg in self.legs)

    @property
    def completion_tokens(self) -> int:
        return sum(len(leg.tokens) for leg in self.legs)

    @property
    def made(self) -> list[int]:
        """All tokens of the output so far."""
        return [token for leg in self.legs for token in leg.tokens]

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


class Meter:
    def __init__(self, identity: Identity, database: Database, pricing: PricingConfig) -> None:
        self._identity = identity
        self._database = database
        self._pricing = pricing

    async def settle(self, account: Account, finish_reason: str) -> None:
        """Sign and write; returns when usage, receipt and the key's counters are on disk."""
        account.total_ms = account.elapsed_ms()
        price = self._price(account.job.model.id)
        prompt, prompt_opening = commitment.commit(
            commitment.prompt_text(account.job.messages, account.job.stop),
            account.served[0].prompt or [],
        )
        proofs, openings = self._prove(account, price, prompt)
        text = "".join(part for leg in account.served for part in leg.text)
        output, output_opening = commitment.commit(text, account.made)
        last = account.served[-1].started
        cost = amount.cost(total_tokens(proofs), price.per_1k_tokens)
        receipt = Receipt(
            request_id=account.job.request_id,
            timestamp=utc_text(account.created),
            coordinator_id=self._identity.node_id,
            node_id=last.node_id,
            model=account.job.model.id,
            model_digest=last.model_digest,
            payment_amount=amount.to_text(cost),
            currency=price.currency,
            finish_reason=finish_reason,
            routing=_routing(account),
            proofs=[sign_proof(self._identity, proof) for proof in proofs],
            prompt_commitment=prompt,
            output_commitment=output,
            usage=Usage(account.prompt_tokens, account.completion_tokens, account.cached_tokens),
        )
        signed, signature = sign_receipt(self._identity, receipt)
        opening = {"prompt": prompt_opening, "output": output_opening, "legs": openings}
        await settle(
            self._database,
            self._row(account, receipt, cost),
            StoredReceipt(account.job.request_id, signed, signature, msgspec.json.encode(opening)),
        )

    def _price(self, model_id: str) -> Price:
        per_1k = self._pricing.models.get(model_id, self._pricing.per_1k_tokens)
        return Price(self._pricing.currency, per_1k)

    def _prove(
        self, account: Account, price: Price, prompt_commitment: str
    ) -> tuple[list[Proof], list[commitment.Opening]]:
        proofs, openings = [], []
        for number, leg in enumerate(account.served):
            output, opening = commitment.commit("".join(leg.text), leg.tokens)
            openings.append(opening)
            proofs.append(
                Proof(
                    request_id=account.job.request_id,
                    leg=number,
                    node_id=leg.started.node_id,
                    model=account.job.model.id,
                    model_digest=leg.started.model_digest,
                    engine=leg.started.engine,
                    sampling=sampling_record(leg.started.sampling, account.job.max_tokens),
                    prompt_commitment=prompt_commitment,
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
                )
            )
        return proofs, openings

    def _row(self, account: Account, receipt: Receipt, cost: int) -> RequestRow:
        return RequestRow(
            request_id=receipt.request_id,
            key_id=account.key_id,
            created_at=int(account.created * 1000),
            model=receipt.model,
            node_id=receipt.node_id,
            finish_reason=receipt.finish_reason,
            prompt_tokens=receipt.usage.prompt_tokens,
            cached_tokens=receipt.usage.cached_tokens,
            completion_tokens=receipt.usage.completion_tokens,
            amount=cost,
            queue_ms=account.queue_ms,
            ttft_ms=account.ttft_ms,
            total_ms=account.total_ms,
        )


def _routing(account: Account) -> dict[str, Any]:
    # Until peers and upstreams exist there is one candidate, and it wins.
    chosen = account.served[-1].started.node_id
    return {"policy": "local", "candidates": [{"node_id": chosen, "backend": "local"}]}
