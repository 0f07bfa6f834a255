"""Tokens on their way out: text, stop strings, frames.  Runs beside the steps, in its own thread.

A frame holds all that was said since the last one, so that a slow reader gets fewer and larger
frames, and never slows a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.intake import PreparedRequest
from pinaivu_box.engine.messages import (
    EngineLoad,
    Refused,
    SequenceDelta,
    StepFrame,
    TokenLogprob,
)

_LARGE = 1 << 14  # log-probabilities


@dataclass(frozen=True)
class SequenceOutput:
    """What a step gave one sequence.  `queue_ms` and `cached_tokens` come with its first token, or
    its end if it has begun and has none; `scored` are tokens of its prompt."""

    id: str
    tokens: list[int]
    finish_reason: str | None = None
    end_token: bool = False  # the last of `tokens` is one: it has no text
    queue_ms: float | None = None
    cached_tokens: int | None = None
    shifted_tokens: int = 0
    logprobs: Sequence[TokenLogprob] = ()
    vectors: list[bytes] = field(default_factory=list)
    scored: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class StepOutput:
    """`plain`, in a steady step: the ids and one token each, which is no end."""

    said: list[SequenceOutput]
    load: EngineLoad
    plain: tuple[list[str], list[int]] = ([], [])


@dataclass
class _Pending:
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    queue_ms: float | None = None
    cached_tokens: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_string: str | None = None
    vectors: list[bytes] = field(default_factory=list)


class OutputBuffer:
    """`take` what happened, then `frame` it."""

    def __init__(self) -> None:
        self._detokenizers: dict[str, Detokenizer] = {}
        self._frame = StepFrame([], [], [], EngineLoad())
        self._pending: dict[str, _Pending] = {}
        self._shifted: dict[str, int] = {}  # tokens that a sequence has forgotten, if it has
        # Of tokens whose text is held back, as it may be the beginning of a stop string.
        self._held: dict[str, list[TokenLogprob]] = {}

    @property
    def large(self) -> bool:
        """Whether the next frame should go out before more is taken (about 6 MB)."""
        return sum(len(one.logprobs) for one in self._pending.values()) > _LARGE

    def take(self, event: PreparedRequest | Refused | StepOutput) -> list[str]:
        """Returns the ids of sequences that a stop string has just ended."""
        if isinstance(event, Refused):
            self._frame.refused.append(event)
            self._detokenizers.pop(event.id, None)
            self._held.pop(event.id, None)
            return []
        if isinstance(event, PreparedRequest):
            self._frame.admitted.append(event.admitted)
            self._detokenizers[event.admitted.id] = event.detokenizer
            return []
        self._frame = StepFrame(self._frame.admitted, self._frame.refused, [], event.load)
        stopped = [said.id for said in event.said if self._say(said)]
        for request_id, token in zip(*event.plain, strict=True):
            if self._say_plain(request_id, token):
                stopped.append(request_id)
        return stopped

    def frame(self) -> StepFrame:
        """All that was taken since the last one."""
        frame = self._frame
        for request_id, pending in self._pending.items():
            frame.deltas.append(
                SequenceDelta(
                    request_id,
                    "".join(pending.text),
                    pending.tokens,
                    pending.finish_reason,
                    pending.queue_ms,
                    pending.cached_tokens,
                    self._shifted.get(request_id, 0),
                    pending.logprobs,
                    pending.stop_string,
                    pending.vectors,
                )
            )
            if pending.finish_reason:
                self._shifted.pop(request_id, None)
        self._pending = {}
        self._frame = StepFrame([], [], [], frame.load)
        return frame

    def _say_plain(self, request_id: str, token: int) -> bool:
        detokenizer = self._detokenizers.get(request_id)
        if detokenizer is None:
            return False
        pending = self._pending.get(request_id)
        if pending is None:
            pending = self._pending[request_id] = _Pending()
        pending.tokens.append(token)
        pending.text.append(detokenizer.push(token))
        if detokenizer.stopped:
            pending.finish_reason = "stop"
            pending.stop_string = detokenizer.stop_string
            del self._detokenizers[request_id]
        return detokenizer.stopped

    def _say(self, said: SequenceOutput) -> bool:
        """Returns whether a stop string has ended it."""
        detokenizer = self._detokenizers.get(said.id)
        if detokenizer is None:
            return False  # a stop string had ended it before the engine knew
        pending = self._pending.setdefault(said.id, _Pending())
        # Those of an earlier leg's tokens wait with their text, if they are no prompt's.
        waiting = self._held.setdefault(said.id, []) if detokenizer.holds else pending.logprobs
        waiting += said.scored
        finish_reason = said.finish_reason
        text_tokens = len(said.tokens) - said.end_token
        for number, token in enumerate(said.tokens):
            pending.tokens.append(token)
            if number < text_tokens:
                text = detokenizer.push(token)
                pending.text.append(text)
                if said.logprobs:
                    self._release(said.id, said.logprobs[number], text, detokenizer, pending)
                if detokenizer.stopped:
                    finish_reason = "stop"
                    break
        if finish_reason:
            pending.text.append(detokenizer.flush())
            pending.logprobs += self._held.pop(said.id, [])
            pending.finish_reason = finish_reason
            pending.stop_string = detokenizer.stop_string
            pending.vectors = said.vectors
            del self._detokenizers[said.id]
        if said.queue_ms is not None:
            pending.queue_ms, pending.cached_tokens = said.queue_ms, said.cached_tokens
        if said.shifted_tokens:
            self._shifted[said.id] = said.shifted_tokens
        return detokenizer.stopped

    def _release(
        self,
        request_id: str,
        logprob: TokenLogprob,
        text: str,
        detokenizer: Detokenizer,
        pending: _Pending,
    ) -> None:
        """Log-probabilities come with their text, and those of a stop string never."""
        held = self._held.setdefault(request_id, [])
        held.append(logprob)
        if detokenizer.stopped:
            # The stop string's tokens are the last; one that also holds text before it counts.
            pending.logprobs += held if text else []
            held.clear()
        elif not detokenizer.holds:
            pending.logprobs += held
            held.clear()
