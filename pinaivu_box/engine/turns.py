"""Threads that tenants share fairly: of a tenant one job runs at a time, in the order of arrival,
and the tenant that has waited longest for a turn is next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Turns:
    """`put` never blocks.  A job must not raise: that ends the process (see `worker`)."""

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: dict[str, deque[Job]] = {}  # of tenants that wait or run
        self._ready: deque[str] = deque()  # tenants that wait and have no job running
        self._changed = threading.Condition()
        for _ in range(threads):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, tenant: str, job: Job) -> None:
        with self._changed:
            jobs = self._jobs.get(tenant)
            if jobs is not None:
                jobs.append(job)
                return
            self._jobs[tenant] = deque([job])
            self._ready.append(tenant)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    self._changed.wait()
                tenant = self._ready.popleft()
                job = self._jobs[tenant][0]  # the others see by it that one runs
            job()
            with self._changed:
                jobs = self._jobs[tenant]
                jobs.popleft()
                if jobs:
                    self._ready.append(tenant)
                    self._changed.notify()
                else:
                    del self._jobs[tenant]
