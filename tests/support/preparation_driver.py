"""A preparation queue, with what it reports and schedules in queues that a test reads."""

from __future__ import annotations

import queue
from typing import Any

from pinaivu_box.engine.preparation_queue import PreparationQueue
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer

PATIENCE_SECONDS = 100  # until a test gives up; nothing is measured


class PreparationDriver:
    def __init__(self, preparer: RequestPreparer) -> None:
        self.reported: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.scheduled: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.take = PreparationQueue(preparer, self.reported.put, self.scheduled.put).take

    def next_reported(self) -> Any:
        return self.reported.get(timeout=PATIENCE_SECONDS)

    def next_scheduled(self) -> Any:
        return self.scheduled.get(timeout=PATIENCE_SECONDS)


def name_of(item: Any) -> str:
    """The id of the request that was reported."""
    return str(item.sequence.id if isinstance(item, PreparedRequest) else item.id)
