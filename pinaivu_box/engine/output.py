"""Turns the output of steps into text and frames, mostly in a thread of its own (`frame_writer`).

A frame holds all output since the last one: a slow reader gets fewer and larger frames, and never
slows a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.messages import (
    EngineLoad,
    Output,
    Prompt,
    Refused,
    ReplayedToken,
    StepFrame,
    TokenLogprob,
)
from pinaivu_box.engine.numbers_digest import NumbersDigest
from pinaivu_box.engine.request_preparer import PreparedRequest
from pinaivu_box.engine.runner import Float32

Logits = Sequence[np.float32] | Float32  # of tokens, one each
NO_LOGITS: Float32 = np.empty(0, np.float32)
_MAX_FRAME_LOGPROBS = 1 << 14  # about 6 MB


@dataclass(frozen=True)
class SequenceOutput:
    """The output of one step for one sequence.

    `queue_ms` and `cached_tokens` come with its first token, or with its end if it has begun and
    has no token.  `logprobs` are those of `tokens`, `prompt_logprobs` those of tokens that were
    given: of its prompt, or of the output of an earlier leg.  `logits` are the tokens' own as the
    model gave them.
    """

    id: str
    tokens: list[int]
    finish_reason: str | None = None
    end_token: bool = False  # the last of `tokens` is one: it has no text
    queue_ms: float | None = None
    cached_tokens: int | None = None
    shifted_tokens: int = 0
    logprobs: Sequence[TokenLogprob] = ()
    logits: Logits = field(default_factory=lambda: NO_LOGITS)
    vectors: list[bytes] = field(default_factory=list)
    replayed: Sequence[ReplayedToken] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()


class StepOutput(Struct, frozen=True):
    """The output of a step, and what has happened since the one before.

    `plain` is the output of a step without a plan: ids, and one token for each, none of which ends
    its sequence, with its logit.
    """

    sequences: Sequence[SequenceOutput]
    load: EngineLoad
    plain: tuple[list[str], list[int], Logits] = ([], [], NO_LOGITS)
    refused: Sequence[Refused] = ()


@dataclass
class _OpenSequence:
    """One that is admitted and has not ended.  `withheld` are the log-probabilities of tokens whose
    text may be the beginning of a stop string; `numbers` is over what was reported."""

    detokenizer: Detokenizer
    numbers: NumbersDigest = field(default_factory=NumbersDigest)
    shifted_tokens: int = 0
    withheld: list[TokenLogprob] = field(default_factory=list)


class OutputBuffer:
    """Collects events (`take`) and makes frames of them (`frame`)."""

    def __init__(self) -> None:
        self._open: dict[str, _OpenSequence] = {}
        self._prompts: dict[str, Prompt] = {}
        self._refused: list[Refused] = []
        self._deltas: dict[str, Output] = {}
        self._load = EngineLoad()
        self._numbers: dict[str, bytes] = {}  # of the sequences that have ended
        self._replayed: dict[str, list[ReplayedToken]] = {}
        self._logprobs = 0  # taken since the last frame

    @property
    def large(self) -> bool:
        """Whether the next frame should go out before more is taken."""
        return self._logprobs > _MAX_FRAME_LOGPROBS

    def take(self, event: PreparedRequest | Refused | StepOutput) -> list[str]:
        """Add an event.  Returns the ids of sequences that a stop string has just ended."""
        if isinstance(event, Refused):
            self._refuse(event)
            return []
        if isinstance(event, PreparedRequest):
            self._prompts[event.sequence.id] = event.prompt
            self._open[event.sequence.id] = _OpenSequence(event.detokenizer)
            return []
        self._load = event.load
        for refused in event.refused:
            self._refuse(refused)
        stopped = [output.id for output in event.sequences if self._add(output)]
        for request_id, token, logit in zip(*event.plain, strict=True):
            if self._add_token(request_id, token, logit):
                stopped.append(request_id)
        return stopped

    def frame(self) -> StepFrame:
        """All that was taken since the last frame."""
        frame = StepFrame(
            self._prompts, self._refused, self._deltas, self._load, self._numbers, self._replayed
        )
        self._prompts, self._refused, self._deltas, self._logprobs = {}, [], {}, 0
        self._numbers, self._replayed = {}, {}
        return frame

    def _refuse(self, refused: Refused) -> None:
        self._refused.append(refused)
        self._open.pop(refused.id, None)

    def _delta(self, request_id: str, sequence: _OpenSequence) -> Output:
        delta = self._deltas.get(request_id)
        if delta is None:
            delta = Output("", [], shifted_tokens=sequence.shifted_tokens)
            self._deltas[request_id] = delta
        return delta

    def _add_token(self, request_id: str, token: int, logit: np.float32) -> bool:
        """Returns whether a stop string has ended the sequence."""
        sequence = self._open.get(request_id)
        if sequence is None:
            return False
        sequence.numbers.add(token, logit)
        text = sequence.detokenizer.push(token)
        delta = self._deltas.get(request_id)
        if delta is None:  # the usual case, once a token
            delta = Output(text, [token], shifted_tokens=sequence.shifted_tokens)
            self._deltas[request_id] = delta
        else:
            delta.tokens.append(token)
            delta.text += text
        stop_string = sequence.detokenizer.stop_string
        if stop_string is None:
            return False
        delta.finish_reason, delta.stop_string = "stop", stop_string
        self._close(request_id)
        return True

    def _add(self, output: SequenceOutput) -> bool:
        """Returns whether a stop string has ended the sequence."""
        sequence = self._open.get(output.id)
        if sequence is None:
            return False  # a stop string had ended it before the engine knew
        self._logprobs += len(output.logprobs) + len(output.prompt_logprobs)
        delta, detokenizer = self._delta(output.id, sequence), sequence.detokenizer
        # Those of an earlier leg's output wait with its text.
        waiting = sequence.withheld if detokenizer.holds else delta.logprobs
        waiting += output.prompt_logprobs
        finish_reason = output.finish_reason
        text_tokens = len(output.tokens) - output.end_token
        for number, token in enumerate(output.tokens):
            delta.tokens.append(token)
            sequence.numbers.add(token, output.logits[number])
            if output.replayed:
                self._replayed.setdefault(output.id, []).append(output.replayed[number])
            if number < text_tokens:
                text = detokenizer.push(token)
                delta.text += text
                if output.logprobs:
                    sequence.withheld.append(output.logprobs[number])
                    _release(sequence, text, delta)
                if detokenizer.stopped:
                    finish_reason = "stop"
                    break
        if output.queue_ms is not None:
            delta.queue_ms, delta.cached_tokens = output.queue_ms, output.cached_tokens
        if output.shifted_tokens:
            delta.shifted_tokens = sequence.shifted_tokens = output.shifted_tokens
        if finish_reason:
            delta.text += detokenizer.flush()
            delta.logprobs += sequence.withheld
            delta.finish_reason = finish_reason
            delta.stop_string = detokenizer.stop_string
            delta.vectors = output.vectors
            self._close(output.id)
        return detokenizer.stopped

    def _close(self, request_id: str) -> None:
        """It has ended: what was reported of it is all."""
        self._numbers[request_id] = self._open.pop(request_id).numbers.digest


def _release(sequence: _OpenSequence, text: str, delta: Output) -> None:
    """Log-probabilities come with their text, and those of a stop string never."""
    detokenizer = sequence.detokenizer
    if detokenizer.stopped:
        # The stop string's tokens are the last; one that also holds text before it counts.
        delta.logprobs += sequence.withheld if text else []
        sequence.withheld.clear()
    elif not detokenizer.holds:
        delta.logprobs += sequence.withheld
        sequence.withheld.clear()
