"""The body of `GET /v1/usage`, also what `pinaivu usage --json` prints."""

from __future__ import annotations

from msgspec import Struct

from pinaivu_box.amount import to_text
from pinaivu_box.store.requests import ModelUsage


class UsageByModel(Struct, frozen=True):
    """`cost` is a decimal number in text, in the report's currency."""

    model: str
    requests: int
    tokens: int
    prompt_tokens: int
    completion_tokens: int
    cost: str


class UsageReport(Struct, frozen=True, omit_defaults=True):
    total_requests: int
    total_tokens: int
    prompt_tokens: int
    completion_tokens: int
    cost: str
    currency: str
    by_model: list[UsageByModel]
    request_id: str | None = None


def report(rows: list[ModelUsage], request_id: str | None, currency: str) -> UsageReport:
    prompt = sum(row.prompt_tokens for row in rows)
    completion = sum(row.completion_tokens for row in rows)
    return UsageReport(
        total_requests=sum(row.requests for row in rows),
        total_tokens=prompt + completion,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=to_text(sum(row.amount for row in rows)),
        currency=currency,
        by_model=[
            UsageByModel(
                model=row.model,
                requests=row.requests,
                tokens=row.prompt_tokens + row.completion_tokens,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=row.completion_tokens,
                cost=to_text(row.amount),
            )
            for row in rows
        ],
        request_id=request_id,
    )
