"""The engine's sandboxes: where a template is run and a grammar tried (see `pinaivu_box.sandbox`).

They are children of the engine, and end with it.  Tests put functions of their own process here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pinaivu_box.sandbox import Cancellation, SandboxLimits, SandboxPool

# Of one job.  What people send takes some milliseconds, with thousands of properties half a second.
LIMITS = SandboxLimits(cpu_seconds=2.0, memory_bytes=512 << 20)


class SandboxRun(Protocol):
    def __call__(
        self, payload: bytes, *, tenant: str = "", cancellation: Cancellation | None = None
    ) -> bytes:
        """Raises SandboxLimit, SandboxCancelled, and the ApiError that the job raised."""
        ...


@dataclass(frozen=True)
class Sandboxes:
    """`templates` runs what `chat_template.make` returns, and `trials(vocabulary)` what
    `grammar_validation.make` returns for that."""

    templates: SandboxRun
    trials: Callable[[bytes], SandboxRun]


def start() -> Sandboxes:
    """A child for templates starts now, those for grammars with the first grammar."""
    templates = SandboxPool("pinaivu_box.engine.chat_template:make", limits=LIMITS)
    templates.start()
    return Sandboxes(templates.run, _trials)


def _trials(vocabulary: bytes) -> SandboxRun:
    return SandboxPool("pinaivu_box.engine.grammar_validation:make", vocabulary, limits=LIMITS).run


def reached(limit: str) -> str:
    """A limit in words."""
    if limit == "time":
        return f"takes more than {LIMITS.cpu_seconds:g} s of CPU time"
    if limit == "memory":
        return f"takes more than {LIMITS.memory_bytes >> 20} MB of memory"
    return "takes more memory or deeper recursion than is allowed"
