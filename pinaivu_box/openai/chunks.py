"""Stream chunks: everything that repeats is encoded once per request."""

from __future__ import annotations

import msgspec

from pinaivu_box.errors import ApiError
from pinaivu_box.openai.types import Chunk, ChunkChoice, ContextShift, Delta, Usage

DONE = b"data: [DONE]\n\n"
_MARK = "\x00"  # encoded as \u0000, which nothing else in a chunk can contain
_ENCODED_MARK = b'"\\u0000"'


class ChunkBuilder:
    """Builds one stream's `data:` events.  `with_usage` is `stream_options.include_usage`."""

    def __init__(
        self, *, completion_id: str, request_id: str, created: int, model: str, with_usage: bool
    ) -> None:
        # With include_usage every chunk but the last says "usage": null, as OpenAI's does.
        self._empty = Chunk(
            id=completion_id,
            request_id=request_id,
            created=created,
            model=model,
            choices=[],
            usage=None if with_usage else msgspec.UNSET,
        )
        self._with_usage = with_usage
        marked = self._event([ChunkChoice(Delta(content=_MARK))])
        self._before, self._after = marked.split(_ENCODED_MARK)

    def role(self) -> bytes:
        return self._event([ChunkChoice(Delta(role="assistant", content=""))])

    def text(self, text: str) -> bytes:
        return self._before + msgspec.json.encode(text) + self._after

    def end(self, finish_reason: str, usage: Usage, shifted_tokens: int = 0) -> bytes:
        """The last chunks: finish reason, usage if asked for, `[DONE]`."""
        if shifted_tokens:
            shift = ContextShift(shifted_tokens)
            self._empty = msgspec.structs.replace(self._empty, context_shift=shift)
        events = self._event([ChunkChoice(Delta(), finish_reason)])
        if self._with_usage:
            events += self._event([], usage)
        return events + DONE

    def error(self, error: ApiError) -> bytes:
        """An error after the stream began; SDKs raise it when they see `error`."""
        body = {"message": error.message, "type": error.type, "param": None, "code": error.code}
        return _event({"error": body})

    def _event(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = msgspec.structs.replace(self._empty, choices=choices)
        return _event(msgspec.structs.replace(chunk, usage=usage) if usage else chunk)


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
