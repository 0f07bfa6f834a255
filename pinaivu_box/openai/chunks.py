"""Stream chunks: everything that repeats is encoded once per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from pinaivu_box.errors import ApiError
from pinaivu_box.openai import reader
from pinaivu_box.openai.types import (
    ChoiceLogprobs,
    Chunk,
    ChunkChoice,
    ContextShift,
    CustomDelta,
    Delta,
    FunctionDelta,
    TokenLogprobs,
    ToolCallDelta,
    Usage,
)

DONE = b"data: [DONE]\n\n"
_MARK = "\x00"  # encoded as \u0000, which nothing else in a chunk can contain
_ENCODED_MARK = b'"\\u0000"'


class ChunkBuilder:
    """Builds one stream's `data:` events.  `with_usage` is `stream_options.include_usage`."""

    def __init__(self, empty: Chunk, *, with_usage: bool) -> None:
        # With include_usage every chunk but the last says "usage": null, as OpenAI's does.
        self._empty = msgspec.structs.replace(empty, usage=None) if with_usage else empty
        self._with_usage = with_usage
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def begin(self, choice: int, fingerprint: str, ignored: list[str]) -> bytes:
        """The role; `fingerprint` is of the system that has begun, `ignored` what was passed
        over."""
        self._empty = msgspec.structs.replace(
            self._empty, system_fingerprint=fingerprint, ignored_parameters=ignored or UNSET
        )
        marked = self._event([ChunkChoice(Delta(content=_MARK), index=choice)])
        start, end = marked.split(_ENCODED_MARK)
        self._around[choice] = start, end
        return self._event([ChunkChoice(Delta(role="assistant", content=""), index=choice)])

    def pieces(
        self, choice: int, pieces: Sequence[reader.Piece], logprobs: list[TokenLogprobs]
    ) -> bytes:
        """A chunk for each piece; the log-probabilities come with the first."""
        parts = []
        for piece in pieces:
            if isinstance(piece, reader.Text) and not logprobs:
                before, after = self._around[choice]
                parts.append(before + msgspec.json.encode(piece.text) + after)
                continue
            held = ChoiceLogprobs(logprobs) if logprobs else None
            parts.append(self._event([ChunkChoice(_delta(piece), index=choice, logprobs=held)]))
            logprobs = []
        if logprobs:
            held = ChoiceLogprobs(logprobs)
            empty = Delta(content="")
            parts.append(self._event([ChunkChoice(empty, index=choice, logprobs=held)]))
        return b"".join(parts)

    def finish(self, choice: int, finish_reason: str, shifted_tokens: int = 0) -> bytes:
        """A choice's last chunk."""
        if shifted_tokens:
            shift = ContextShift(shifted_tokens)
            self._empty = msgspec.structs.replace(self._empty, context_shift=shift)
        return self._event([ChunkChoice(Delta(), finish_reason, choice)])

    def end(self, usage: Usage) -> bytes:
        """The usage if asked for, and `[DONE]`."""
        return (self._event([], usage) if self._with_usage else b"") + DONE

    def _event(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = msgspec.structs.replace(self._empty, choices=choices)
        return event(msgspec.structs.replace(chunk, usage=usage) if usage else chunk)


def _delta(piece: reader.Piece) -> Delta:
    match piece:
        case reader.Text():
            return Delta(content=piece.text)
        case reader.Thought():
            return Delta(reasoning_content=piece.text)
        case reader.ParsedCall():
            called: dict[str, Any] = (
                {"type": "custom", "custom": CustomDelta("", piece.name)}
                if piece.custom
                else {"type": "function", "function": FunctionDelta(piece.name, "")}
            )
            return Delta(tool_calls=[ToolCallDelta(piece.index, id=piece.id, **called)])
        case reader.Arguments():
            more: dict[str, Any] = (
                {"custom": CustomDelta(piece.text)}
                if piece.custom
                else {"function": FunctionDelta(UNSET, piece.text)}
            )
            return Delta(tool_calls=[ToolCallDelta(piece.index, **more)])


def event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """An error after the stream began; SDKs raise it when they see `error`."""
    body = {"message": error.message, "type": error.type, "param": None, "code": error.code}
    return event({"error": body})
