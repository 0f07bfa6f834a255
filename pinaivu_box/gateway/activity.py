"""What ended lately, for those who watch the box."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pinaivu_box.changes import Changes
from pinaivu_box.gateway.records import RequestRecord
from pinaivu_box.store.keys import Key
from pinaivu_box.store.times import now_ms

MAX_FINISHED = 50


@dataclass(frozen=True)
class FinishedRequest:
    """A request that has ended: `status` is HTTP's, `at` Unix milliseconds, `amount` in 10^-9 of
    the currency; `node_id` is "" if no box has begun it; `receipt` says whether it has one."""

    number: int  # 1, 2, ... since the box started
    request_id: str
    at: int
    key: Key
    model: str
    node_id: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    amount: int
    ttft_ms: int | None
    total_ms: int
    receipt: bool


class Activity:
    """The requests that ended last, the latest last; `changes` wakes when one begins or ends."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.finished: deque[FinishedRequest] = deque(maxlen=MAX_FINISHED)
        self.followers = 0  # streams of it
        self.ended_count = 0  # since the box started

    def begun(self) -> None:
        self.changes.notify()

    def ended(self, record: RequestRecord, key: Key, status: int) -> None:
        self.ended_count += 1
        self.finished.append(
            FinishedRequest(
                number=self.ended_count,
                request_id=record.job.request_id,
                at=now_ms(),
                key=key,
                model=record.job.model.id,
                node_id=node_of(record),
                status=status,
                prompt_tokens=record.prompt_tokens,
                cached_tokens=record.cached_tokens,
                completion_tokens=record.completion_tokens,
                amount=record.cost,
                ttft_ms=record.ttft_ms,
                total_ms=record.elapsed_ms(),
                receipt=record.metered,
            )
        )
        self.changes.notify()


def node_of(record: RequestRecord) -> str:
    """The box that computed, or computes, the latest leg; "" if there is none."""
    legs = [leg for choice in record.choices for leg in choice.legs]
    return legs[-1].started.node_id if legs else ""
