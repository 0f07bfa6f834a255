"""New tokens of a leg: the event that goes from a backend to the client's stream.

A frame of a peer holds it as it is, so it is decoded straight from there (see `legs.wire`).  This
module imports little: a sandbox that checks such frames loads it.
"""

from __future__ import annotations

from msgspec import Struct

from pinaivu_box.engine.messages import TokenLogprob


class _Addressed:
    """What no frame holds; see Output."""

    choice: int = 0
    mark: str | None = None


class Output(_Addressed, Struct, array_like=True, dict=True):
    """New text and tokens; the last one has a finish reason.

    `queue_ms` and `cached_tokens` (of the prompt) come with the first.  `shifted_tokens` were
    forgotten so far (context shift).  An echo's `logprobs` are first those of the prompt.  `mark`
    (hex) is that of the frame in which a peer has sent it (see `receipt.mark_text`), and `choice`,
    which the runner sets, tells the choices of a request apart.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None = None
    queue_ms: float | None = None
    cached_tokens: int | None = None
    shifted_tokens: int = 0
    logprobs: list[TokenLogprob] = []
    stop_string: str | None = None
    vectors: list[bytes] = []
