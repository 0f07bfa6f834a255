"""The engine's sandboxes, in which templates run and grammars are validated.

They (see `pinaivu_box.sandbox`) are children of the engine, and end with it.  Tests put functions
of their own process here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pinaivu_box.sandbox import Cancellation, SandboxLimits, SandboxPool

# Of one job.  What people send takes some milliseconds, with thousands of properties half a second.
LIMITS = SandboxLimits(cpu_seconds=2.0, memory_bytes=512 << 20)

# Runs one job, as `SandboxPool.run`.
SandboxRun = Callable[[bytes, Cancellation | None], bytes]


@dataclass(frozen=True)
class Sandboxes:
    """`templates` runs what `chat_template.make` returns, and `grammars(vocabulary)` what
    `grammar_validation.make` returns for that."""

    templates: SandboxRun
    grammars: Callable[[bytes], SandboxRun]


def start() -> Sandboxes:
    """A child for templates starts now, those for grammars with the first grammar."""
    templates = SandboxPool("pinaivu_box.engine.chat_template:make", limits=LIMITS)
    templates.start()
    return Sandboxes(templates.run, _grammars)


def _grammars(vocabulary: bytes) -> SandboxRun:
    return SandboxPool("pinaivu_box.engine.grammar_validation:make", vocabulary, limits=LIMITS).run
