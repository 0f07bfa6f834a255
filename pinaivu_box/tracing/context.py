"""Which trace a request belongs to: W3C Trace Context (the header `traceparent`)."""

from __future__ import annotations

import random
import re
import secrets
import time
from dataclasses import dataclass, field

HEADER = "traceparent"
_TRACEPARENT = re.compile(
    "(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    "(?P<more>-.{0,512})?"
)
_SAMPLED = 1


@dataclass(frozen=True)
class TraceContext:
    """A span of a sampled trace, which began at `began` (Unix seconds); ids in hex.  `parent_id` is
    "" at the root."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    began: float = field(default_factory=time.time)

    def child(self) -> TraceContext:
        return TraceContext(self.trace_id, new_span_id(), self.span_id)

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED:02x}"


def begin(traceparent: str | None, sample: float) -> TraceContext | None:
    """The span of a request whose client sent this header, or None if the trace is not sampled.

    A client that takes part in a trace has decided that; of the others, `sample` are (0 to 1).
    """
    parent = _parent(traceparent) if traceparent is not None else None
    if parent is None:
        # No secret: a generator that is fast will do.
        sampled = sample > 0 and (sample >= 1 or random.random() < sample)  # noqa: S311
        return TraceContext(secrets.token_hex(16), new_span_id()) if sampled else None
    trace_id, span_id, flags = parent
    return TraceContext(trace_id, new_span_id(), span_id) if flags & _SAMPLED else None


def new_span_id() -> str:
    return secrets.token_hex(8)


def _parent(header: str) -> tuple[str, str, int] | None:
    """Trace, span and flags; None if the header is not valid, which starts a new trace."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or match["version"] == "ff":
        return None
    if match["version"] == "00" and match["more"]:
        return None
    if not int(match["trace"], 16) or not int(match["span"], 16):
        return None
    return match["trace"], match["span"], int(match["flags"], 16)
