"""Large bodies, decoded in a child process (see `pinaivu_box.sandbox`).

A few megabytes of JSON can take seconds to decode and validate, while the decoder holds the
interpreter's lock.  The child runs the same `decode` as for small bodies and returns the struct as
msgpack, which is decoded quickly because its number of values is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from pinaivu_box.openai import chat_markdown
from pinaivu_box.openai.anthropic import CountTokensRequest, MessagesRequest
from pinaivu_box.openai.completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from pinaivu_box.openai.conversations import AnswerRequest, Portable
from pinaivu_box.openai.decoding import check_number_of_values, decode
from pinaivu_box.openai.embeddings import EmbeddingRequest
from pinaivu_box.openai.responses import ResponseRequest
from pinaivu_box.openai.types import ChatRequest

ENTRY = "pinaivu_box.openai.large_bodies:make"
_KINDS: dict[str, type[Struct]] = {
    kind.__name__: kind
    for kind in (
        AnswerRequest,
        ChatRequest,
        CompletionRequest,
        CountTokensRequest,
        DetokenizeRequest,
        EmbeddingRequest,
        MessagesRequest,
        Portable,
        ResponseRequest,
        TokenizeRequest,
    )
}
_HISTORY, _MARKDOWN = "history", "markdown"
Body = TypeVar("Body", bound=Struct)


def job(data: bytes, kind: type[Struct], *, strict: bool) -> bytes:
    """The job of decoding a body."""
    return msgspec.msgpack.encode((kind.__name__, strict, data))


def result(answer: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """What `decode` returned in the child."""
    kinds = tuple[kind, list[str]]  # type: ignore[valid-type]
    decoded: tuple[Body, list[str]] = msgspec.msgpack.decode(answer, type=kinds)
    return decoded


def history(rows: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """The items of stored responses, each with its input and body.  Raises BodyTooLarge."""
    items: list[dict[str, Any]] = []
    for response_input, body in rows:
        items += msgspec.json.decode(response_input)
        items += msgspec.json.decode(body)["output"]
        check_number_of_values(items, "The conversation before it")
    return items


def history_job(rows: list[tuple[bytes, bytes]]) -> bytes:
    """The job of calling `history`; its answer is msgpack."""
    return msgspec.msgpack.encode((_HISTORY, False, rows))


def markdown_job(data: bytes) -> bytes:
    """The job of reading a chat in Markdown; its answer is a Portable as msgpack."""
    return msgspec.msgpack.encode((_MARKDOWN, False, data))


def make(_setup: bytes) -> Callable[[bytes], bytes]:
    """Runs in the child.  A job raises what `decode` does."""

    def run(payload: bytes) -> bytes:
        kind, strict, content = msgspec.msgpack.decode(payload)
        if kind == _HISTORY:
            return msgspec.msgpack.encode(history(content))
        if kind == _MARKDOWN:
            return msgspec.msgpack.encode(chat_markdown.read(content))
        decoded: tuple[Any, list[str]] = decode(content, _KINDS[kind], strict=strict)
        return msgspec.msgpack.encode(decoded)

    return run
