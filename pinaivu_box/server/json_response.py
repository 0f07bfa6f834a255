"""Answers in JSON: one document, or one a line."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response, StreamingResponse

T = TypeVar("T")


class JSON(Response, Generic[T]):
    """`content` as msgspec encodes it; a `msgspec.Raw` holds the JSON of a `T` already."""

    media_type = "application/json"

    def __init__(
        self,
        content: T | msgspec.Raw,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class JsonLines(StreamingResponse, Generic[T]):
    """A stream of `T`, one a line."""

    media_type = "application/x-ndjson"

    def __init__(self, items: AsyncIterable[T]) -> None:
        super().__init__(msgspec.json.encode(item) + b"\n" async for item in items)
