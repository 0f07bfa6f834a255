"""Large bodies, decoded in a child process (see `pinaivu_box.sandbox`).

A few megabytes of JSON can take seconds to decode and to validate, and the decoder holds the
interpreter's lock meanwhile.  The child runs the same `decode` as for small bodies and answers with
msgpack of the struct, whose number of values is bounded: that is quickly decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from pinaivu_box.openai.anthropic import CountTokensRequest, MessagesRequest
from pinaivu_box.openai.completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from pinaivu_box.openai.embeddings import EmbeddingRequest
from pinaivu_box.openai.request import check_number_of_values, decode
from pinaivu_box.openai.responses import ResponseRequest
from pinaivu_box.openai.types import ChatRequest

ENTRY = "pinaivu_box.openai.large_bodies:make"
_KINDS: dict[str, type[Struct]] = {
    kind.__name__: kind
    for kind in (
        ChatRequest,
        CompletionRequest,
        CountTokensRequest,
        DetokenizeRequest,
        EmbeddingRequest,
        MessagesRequest,
        ResponseRequest,
        TokenizeRequest,
    )
}
_HISTORY = "history"
Body = TypeVar("Body", bound=Struct)


class _Head(Struct, frozen=True, array_like=True):
    """Comes before the body, and a newline between them."""

    kind: str
    lenient: bool


def job(data: bytes, kind: type[Struct], *, lenient: bool) -> bytes:
    """What the child is given."""
    return b"".join((msgspec.json.encode(_Head(kind.__name__, lenient)), b"\n", data))


def result(answer: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """What `decode` has made of it there."""
    made: tuple[Body, list[str]] = msgspec.msgpack.decode(answer, type=tuple[kind, list[str]])  # type: ignore[valid-type]
    return made


def history(rows: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """The items of stored responses, each given as its input and its body.  Raises BodyTooLarge."""
    items: list[dict[str, Any]] = []
    for given, body in rows:
        items += msgspec.json.decode(given)
        items += msgspec.json.decode(body)["output"]
        check_number_of_values(items, "The conversation before it")
    return items


def history_job(rows: list[tuple[bytes, bytes]]) -> bytes:
    """What the child is given to call `history`."""
    head = msgspec.json.encode(_Head(_HISTORY, False))
    return b"".join((head, b"\n", msgspec.msgpack.encode(rows)))


def history_result(answer: bytes) -> list[dict[str, Any]]:
    return msgspec.msgpack.decode(answer, type=list[dict[str, Any]])


def make(_setup: bytes) -> Callable[[bytes], bytes]:
    """The child's part.  Its job raises what `decode` does."""
    encoder = msgspec.msgpack.Encoder()

    def run(payload: bytes) -> bytes:
        head, _, data = payload.partition(b"\n")
        asked = msgspec.json.decode(head, type=_Head)
        if asked.kind == _HISTORY:
            rows = msgspec.msgpack.decode(data, type=list[tuple[bytes, bytes]])
            return encoder.encode(history(rows))
        made: tuple[Any, list[str]] = decode(data, _KINDS[asked.kind], lenient=asked.lenient)
        return encoder.encode(made)

    return run
