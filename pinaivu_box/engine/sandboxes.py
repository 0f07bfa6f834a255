"""The engine's sandboxes, in which templates run, grammars are validated and images are decoded.

They (see `pinaivu_box.sandbox`) are children of the engine, and end with it.  Tests put functions
of their own process here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pinaivu_box.sandbox import Cancellation, SandboxLimits, SandboxPool

# Of one job.  What people send takes some milliseconds, with thousands of properties half a second.
LIMITS = SandboxLimits(cpu_seconds=2.0, memory_bytes=512 << 20)

# The largest image takes 2 s and 500 MB.
IMAGE_LIMITS = SandboxLimits(cpu_seconds=10.0, memory_bytes=1 << 30)

# Runs one job, as `SandboxPool.run`.
SandboxRun = Callable[[bytes, Cancellation | None], bytes]


@dataclass(frozen=True)
class Sandboxes:
    """`templates` runs what `chat_template.make` returns, `grammars(vocabulary)` what
    `grammar_validation.make` returns for that, and `images` what `image_decoding.make` returns."""

    templates: SandboxRun
    grammars: Callable[[bytes], SandboxRun]
    images: SandboxRun


def start() -> Sandboxes:
    """A child for templates starts now, others with the first grammar or image."""
    templates = SandboxPool("pinaivu_box.engine.chat_template:make", limits=LIMITS)
    templates.start()
    images = SandboxPool("pinaivu_box.engine.image_decoding:make", limits=IMAGE_LIMITS)
    return Sandboxes(templates.run, _grammars, images.run)


def _grammars(vocabulary: bytes) -> SandboxRun:
    return SandboxPool("pinaivu_box.engine.grammar_validation:make", vocabulary, limits=LIMITS).run
