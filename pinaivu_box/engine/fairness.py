"""Who is next: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024).

Each tenant has a counter of the tokens that were computed for it, divided by its weight; whoever
has the lowest is next.  A tenant that had nothing waiting starts at the lowest counter of those
that have: nobody saves up.
"""

from __future__ import annotations

import enum
import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

_MAX_DEPARTED_TENANTS = 1000  # that are remembered, if their counters make a difference
PROMPT_COST, OUTPUT_COST = 1.0, 2.0  # as in the paper


class State(enum.Enum):
    """WAITING → RUNNING → gone; RUNNING → PREEMPTED → RUNNING if another needed its place."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"


@dataclass(eq=False)
class QueuedRequest:
    """What tenants take turns with: a sequence or an embedding job."""

    id: str
    _: KW_ONLY
    tenant: str = ""
    weight: float = 1.0  # the tenant's share
    priority: int = 0  # among the tenant's own: higher goes first
    arrival: int = 0  # a counter: lower is older
    arrived_at: float = field(default_factory=time.monotonic)
    queue_ms: float | None = None  # waited for its first step; None until then
    state: State = State.WAITING

    @property
    def pending(self) -> int:
        """Tokens that are to be computed next."""
        raise NotImplementedError

    def note_start(self) -> None:
        """Note that its first step begins, if none has begun before."""
        if self.queue_ms is None:
            self.queue_ms = (time.monotonic() - self.arrived_at) * 1000


R = TypeVar("R", bound=QueuedRequest)


@dataclass(slots=True)
class _Tenant(Generic[R]):
    counter: float
    weight: float = 1.0
    running: int = 0
    waiting: list[R] = field(default_factory=list)  # by priority, then age


class FairQueue(Generic[R]):
    """What waits, and how much each tenant has had."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[R]] = {}  # those that have something waiting or running
        self._departed: dict[str, float] = {}  # counters of those that had
        self._floor = 0.0  # counter of the tenant that was the last to wait
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[R]:
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def push(self, request: R) -> None:
        """Add a request that is new, or that was preempted and still runs."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = _Tenant(self._departed.pop(request.tenant, 0.0))
            self._tenants[request.tenant] = tenant
        if not tenant.waiting and request.state is State.WAITING:
            # It was idle: that earns no credit, and what it had before still counts.
            others = [other for other in self._tenants.values() if other is not tenant]
            counters = [other.counter for other in others if other.waiting]
            counters = counters or [other.counter for other in others]
            tenant.counter = max(tenant.counter, min(counters, default=self._floor))
        tenant.weight = request.weight
        insort(tenant.waiting, request, key=_rank)
        self._count += 1

    def remove(self, request: R) -> None:
        self._tenants[request.tenant].waiting.remove(request)
        self._count -= 1
        self._forget_idle(request.tenant)

    def first(self, name: str) -> R | None:
        """The tenant's next waiting request."""
        waiting = self._tenants[name].waiting
        return waiting[0] if waiting else None

    def later(self, request: R, arrival: int) -> None:
        """Keep a request waiting, as if it had arrived at `arrival`."""
        waiting = self._tenants[request.tenant].waiting
        waiting.remove(request)
        request.arrival = arrival
        insort(waiting, request, key=_rank)

    def start(self, request: R) -> None:
        """Take a request out of the queue: it runs."""
        tenant = self._tenants[request.tenant]
        tenant.waiting.remove(request)
        tenant.running += 1
        self._count -= 1
        if not tenant.waiting:
            self._floor = tenant.counter

    def stop(self, request: R) -> None:
        """Note that a request no longer runs."""
        self._tenants[request.tenant].running -= 1
        self._forget_idle(request.tenant)

    def charge(self, name: str, prompt_tokens: int, output_tokens: int) -> None:
        """Add computed tokens to the counter of tenant `name`."""
        tenant = self._tenants[name]
        cost = PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens
        tenant.counter += cost / tenant.weight

    def counter(self, name: str) -> float:
        return self._tenants[name].counter

    def order(self) -> Iterator[R]:
        """Waiting requests in the order in which they should start; each tenant's own in turn.

        As if each one that was taken had cost its tenant its prompt.
        """
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        turns = [(t.counter, t.running, number, 0) for number, t in enumerate(waiting)]
        heapify(turns)
        while turns:
            counter, running, number, index = heappop(turns)
            tenant = waiting[number]
            request = tenant.waiting[index]
            yield request
            if index + 1 < len(tenant.waiting):
                counter += PROMPT_COST * request.pending / tenant.weight
                heappush(turns, (counter, running + 1, number, index + 1))

    def over_share(self, name: str) -> str | None:
        """The tenant that runs the most for its weight, if it should give a place to tenant `name`:
        after that it must still run no less for its weight than `name`."""
        asking = self._tenants[name]
        largest = max(
            self._tenants, key=lambda n: self._tenants[n].running / self._tenants[n].weight
        )
        holder = self._tenants[largest]
        fair = (holder.running - 1) / holder.weight >= (asking.running + 1) / asking.weight
        return largest if largest != name and fair else None

    def _forget_idle(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.waiting:
            self._floor = tenant.counter
            if not tenant.running:
                del self._tenants[name]
                self._departed[name] = tenant.counter
                if len(self._departed) > _MAX_DEPARTED_TENANTS:
                    counters = self._departed.items()
                    self._departed = {who: had for who, had in counters if had > self._floor}


def _rank(request: QueuedRequest) -> tuple[int, int]:
    return (-request.priority, request.arrival)
