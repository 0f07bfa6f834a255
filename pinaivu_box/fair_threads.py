"""Threads that tenants share fairly: round robin among tenants, one job of a tenant at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class FairThreads:
    """`put` never blocks.  A tenant's jobs run in the order of arrival.

    A job must not raise: what it raises goes to `threading.excepthook`, and ends its thread.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: dict[str, deque[Job]] = {}  # of tenants that wait or run
        self._ready: deque[str] = deque()  # tenants that wait and have no job running
        self._changed = threading.Condition()
        self._closed = False
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

    def close(self) -> None:
        """End the threads once no job is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    if self._closed:
                        return
                    self._changed.wait()
                tenant = self._ready.popleft()
                job = self._jobs[tenant][0]  # it stays there while it runs
            job()
            with self._changed:
                jobs = self._jobs[tenant]
                jobs.popleft()
                if jobs:
                    self._ready.append(tenant)
                    self._changed.notify()
                else:
                    del self._jobs[tenant]
