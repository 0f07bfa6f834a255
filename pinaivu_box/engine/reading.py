"""Long prompts, read beside everything else, in fair order.

Tokenizing some megabytes takes seconds, in C and without the interpreter's lock.  Of a tenant one
is read at a time, and whoever was served longest ago is next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from pinaivu_box.engine.messages import Add, Embed, Tokenize

_THREADS = 2  # so that one tenant's text does not keep all others waiting

Prompt = Add | Embed | Tokenize


class Reading:
    """`read` is called by threads of its own, for one prompt after the other."""

    def __init__(self, read: Callable[[Prompt], None]) -> None:
        self._read = read
        self._waiting: OrderedDict[str, deque[Prompt]] = OrderedDict()  # by tenant, next one first
        self._busy: set[str] = set()  # tenants
        self._changed = threading.Condition()
        for _ in range(_THREADS):
            threading.Thread(target=self._run, name="reading", daemon=True).start()

    def put(self, prompt: Prompt) -> None:
        with self._changed:
            self._waiting.setdefault(_tenant(prompt), deque()).append(prompt)
            self._changed.notify()

    def drop(self, name: str) -> None:
        """The prompt of that id is not wanted any more, if it still waits."""
        with self._changed:
            for tenant, prompts in self._waiting.items():
                kept = [one for one in prompts if name_of(one) != name]
                if len(kept) < len(prompts):
                    self._waiting[tenant] = deque(kept)
                    if not kept:
                        del self._waiting[tenant]
                    return

    def _run(self) -> None:
        while True:
            with self._changed:
                while (tenant := self._next()) is None:
                    self._changed.wait()
                prompts = self._waiting.pop(tenant)
                prompt = prompts.popleft()
                if prompts:
                    self._waiting[tenant] = prompts  # behind all others
                self._busy.add(tenant)
            try:
                self._read(prompt)
            finally:
                with self._changed:
                    self._busy.discard(tenant)
                    self._changed.notify()

    def _next(self) -> str | None:
        return next((tenant for tenant in self._waiting if tenant not in self._busy), None)


def name_of(prompt: Prompt) -> str:
    return prompt.add.id if isinstance(prompt, Tokenize) else prompt.id


def _tenant(prompt: Prompt) -> str:
    if isinstance(prompt, Embed):
        return prompt.tenant
    return prompt.add.tenant if isinstance(prompt, Tokenize) else prompt.tenant
