"""A run: many requests to one server, in a closed or open loop, with tenants and an intruder."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import msgspec

from pinaivu_box.bench.client import RequestOutcome, stream
from pinaivu_box.bench.target import BenchTarget
from pinaivu_box.bench.workload import Workload, WorkloadRequest, arrivals

_POLL_SECONDS = 0.01
_AFTER_ERROR_SECONDS = 0.1  # a client waits this long after an error, to spare a failed server
# The load is steady when all clients stream at the same time or, if answers are too short for that,
# after this number of requests per client.
_STEADY_ROUNDS = 3


class Tenant(msgspec.Struct, frozen=True):
    """Clients with their own key (None: that of the target)."""

    name: str
    clients: int
    key: str | None = None


class RunPlan(msgspec.Struct, frozen=True):
    """The settings of a run.

    Without `rate` (requests per second, Poisson) it is a closed loop: a client sends its next
    request when the previous one has ended.  Requests begin until there are `requests`, or until
    `seconds` have passed, and in any case until the intruder has its answer; all that began are
    completed.  `warmup` requests come before, are not measured and have other prompts.  `intruder`
    is the length in tokens of one long prompt (0: none).
    """

    workload: Workload
    tenants: tuple[Tenant, ...] = (Tenant("", 1),)
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 0
    intruder: int = 0
    timeout: float = 600.0

    @property
    def clients(self) -> int:
        return sum(tenant.clients for tenant in self.tenants)

    def seeded(self, seed: str) -> RunPlan:
        """The plan with other prompts."""
        workload = msgspec.structs.replace(self.workload, seed=seed)
        return msgspec.structs.replace(self, workload=workload)

    def warming(self) -> RunPlan:
        """The plan of the warm-up."""
        return msgspec.structs.replace(
            self.seeded(f"{self.workload.seed}/warmup"),
            rate=None,
            requests=self.warmup,
            seconds=None,
            warmup=0,
            intruder=0,
        )


class Measured(msgspec.Struct):
    """The result of a run.  Rates are over `begin` to `end` (seconds of the monotonic clock).

    `client_load` is the share of one core that this process used.
    """

    outcomes: list[RequestOutcome]
    intruder: RequestOutcome | None
    begin: float
    end: float
    client_load: float


async def measure(
    target: BenchTarget, plan: RunPlan, ended: Callable[[], None] = lambda: None
) -> Measured:
    """Run the plan; `ended` is called at the end of each measured request."""
    if plan.warmup:
        await _Run(target, plan.warming(), lambda: None).go()
    return await _Run(target, plan, ended).go()


class _Run:
    def __init__(self, target: BenchTarget, plan: RunPlan, ended: Callable[[], None]) -> None:
        self._target = target
        self._plan = plan
        self._ended = ended
        self._numbers = itertools.count()
        self._begun = 0
        self._outcomes: list[RequestOutcome] = []
        self._intruder = RequestOutcome() if plan.intruder else None
        self._begin = 0.0

    async def go(self) -> Measured:
        plan = self._plan
        cpu = time.process_time()
        self._begin = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            if plan.rate is None:
                for number, tenant in enumerate(plan.tenants):
                    for _ in range(tenant.clients):
                        tasks.create_task(self._client(number))
            else:
                tasks.create_task(self._poisson(plan.rate, tasks))
            if self._intruder is not None:
                tasks.create_task(self._intrude(self._intruder))
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        last = max((outcome.ended for outcome in self._outcomes), default=self._begin)
        return Measured(
            outcomes=self._outcomes,
            intruder=self._intruder,
            begin=self._begin,
            end=last if plan.seconds is None else self._begin + plan.seconds,
            client_load=(time.process_time() - cpu) / elapsed,
        )

    # -- the loops -----------------------------------------------------------------------------

    async def _client(self, tenant: int) -> None:
        while self._may_begin():
            self._begun += 1
            outcome = await self._one(tenant)
            if outcome.error:
                await asyncio.sleep(_AFTER_ERROR_SECONDS)

    async def _poisson(self, rate: float, tasks: asyncio.TaskGroup) -> None:
        for after in arrivals(rate, self._plan.workload.seed):
            due = self._begin + after
            if not self._may_begin(due):
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            # Its time starts when it was due, so that a delay of this process counts.
            self._begun += 1
            tasks.create_task(self._one(0, due))

    async def _intrude(self, outcome: RequestOutcome) -> None:
        request = self._plan.workload.intruder(self._plan.intruder)
        message = self._target.message(request)
        while not self._steady():  # noqa: ASYNC110 - an event would burden every arrival
            await asyncio.sleep(_POLL_SECONDS)
        await stream(self._target, message, outcome, self._plan.timeout)

    # -- one request ---------------------------------------------------------------------------

    def _may_begin(self, now: float | None = None) -> bool:
        plan = self._plan
        if self._intruder is not None and not self._intruder.ended:
            return True
        if plan.requests is not None and self._begun >= plan.requests:
            return False
        elapsed = (now or time.monotonic()) - self._begin
        return plan.seconds is None or elapsed < plan.seconds

    async def _one(self, tenant: int, due: float = 0.0) -> RequestOutcome:
        request: WorkloadRequest = self._plan.workload.request(next(self._numbers))
        message = self._target.message(request, self._plan.tenants[tenant].key)
        outcome = RequestOutcome(tenant=tenant, started=due)
        self._outcomes.append(outcome)
        await stream(self._target, message, outcome, self._plan.timeout)
        self._ended()
        return outcome

    def _steady(self) -> bool:
        streaming = sum(1 for outcome in self._outcomes if outcome.arrivals and not outcome.ended)
        ended = sum(1 for outcome in self._outcomes if outcome.ended)
        clients = self._plan.clients
        return streaming >= clients or ended >= _STEADY_ROUNDS * clients
