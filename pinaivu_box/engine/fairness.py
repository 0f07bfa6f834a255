"""Who is next: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024).

Each tenant has a counter of the tokens that were computed for it, divided by its weight; whoever
has the lowest is next.  A tenant that had nothing waiting starts at the lowest counter of those
that have: nobody saves up.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from pinaivu_box.engine.sequence import State

_MAX_DEPARTED_TENANTS = 1000  # that are remembered, if their counters make a difference
PROMPT_COST, OUTPUT_COST = 1.0, 2.0  # as in the paper


class Waiting(Protocol):
    """What the queue needs to know of a sequence or an embedding job."""

    arrival: int

    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def priority(self) -> int: ...

    @property
    def state(self) -> State: ...

    @property
    def pending(self) -> int:
        """Tokens that are to be computed."""
        ...


W = TypeVar("W", bound=Waiting)


class _Tenant(Generic[W]):
    __slots__ = ("counter", "running", "waiting", "weight")

    def __init__(self, counter: float) -> None:
        self.counter = counter
        self.weight = 1.0
        self.running = 0
        self.waiting: list[W] = []  # by priority, then age


class FairQueue(Generic[W]):
    """What waits, and how much each tenant has had."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[W]] = {}  # those that have something waiting or running
        self._departed: dict[str, float] = {}  # counters of those that had
        self._floor = 0.0  # counter of the tenant that was the last to wait
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def push(self, sequence: W) -> None:
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            tenant = self._tenants[sequence.tenant] = _Tenant(
                self._departed.pop(sequence.tenant, 0.0)
            )
        if not tenant.waiting and sequence.state is State.WAITING:
            # It was idle: that earns no credit, and what it had before still counts.
            others = [other for other in self._tenants.values() if other is not tenant]
            counters = [other.counter for other in others if other.waiting]
            counters = counters or [other.counter for other in others]
            tenant.counter = max(tenant.counter, min(counters, default=self._floor))
        tenant.weight = sequence.weight
        insort(tenant.waiting, sequence, key=_rank)
        self._count += 1

    def remove(self, sequence: W) -> None:
        self._tenants[sequence.tenant].waiting.remove(sequence)
        self._count -= 1
        self._forget_idle(sequence.tenant)

    def first(self, name: str) -> W | None:
        """The tenant's own that is next."""
        waiting = self._tenants[name].waiting
        return waiting[0] if waiting else None

    def later(self, sequence: W, arrival: int) -> None:
        """Let it wait on, as if it had arrived then."""
        waiting = self._tenants[sequence.tenant].waiting
        waiting.remove(sequence)
        sequence.arrival = arrival
        insort(waiting, sequence, key=_rank)

    def start(self, sequence: W) -> None:
        """Take it out of the queue: it runs."""
        tenant = self._tenants[sequence.tenant]
        tenant.waiting.remove(sequence)
        tenant.running += 1
        self._count -= 1
        if not tenant.waiting:
            self._floor = tenant.counter

    def stop(self, sequence: W) -> None:
        """Note that it no longer runs."""
        self._tenants[sequence.tenant].running -= 1
        self._forget_idle(sequence.tenant)

    def charge(self, name: str, prompt_tokens: int, output_tokens: int) -> None:
        tenant = self._tenants[name]
        cost = PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens
        tenant.counter += cost / tenant.weight

    def counter(self, name: str) -> float:
        return self._tenants[name].counter

    def order(self) -> Iterator[W]:
        """Waiting sequences in the order in which they should start; each tenant's own in turn.

        As if each one that was taken had cost its tenant its prompt.
        """
        turns = {name: [t.counter, t.running, 0] for name, t in self._tenants.items() if t.waiting}
        while turns:
            name = min(turns, key=lambda n: (turns[n][0], turns[n][1]))
            tenant, turn = self._tenants[name], turns[name]
            sequence: W = tenant.waiting[int(turn[2])]
            yield sequence
            turn[0] += PROMPT_COST * sequence.pending / tenant.weight
            turn[1] += 1
            turn[2] += 1
            if turn[2] >= len(tenant.waiting):
                del turns[name]

    def over_share(self, name: str) -> str | None:
        """The tenant that runs the most for its weight, if one of its places would be better with
        tenant `name`: so that after the change it still has no less than `name`."""
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
                    self._departed = {
                        departed: counter
                        for departed, counter in self._departed.items()
                        if counter > self._floor
                    }


def _rank(sequence: Waiting) -> tuple[int, int]:
    return (-sequence.priority, sequence.arrival)
