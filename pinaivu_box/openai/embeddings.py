"""Wire types of `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.openai import parameters
from pinaivu_box.openai.types import Identifier, KeepAlive, ModelRequest, TextOrTokens


class EmbeddingRequest(ModelRequest, frozen=True):
    """Body of `POST /v1/embeddings`: text or tokens, or a list of them."""

    input: TextOrTokens
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: Identifier | None = None
    keep_alive: KeepAlive | None = None
    prepare = staticmethod(parameters.embedding)


class OneEmbedding(Struct, frozen=True):
    """A list of numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True):
    request_id: str
    model: str
    data: list[OneEmbedding]
    usage: EmbeddingUsage
    object: str = "list"
    ignored_parameters: list[str] | UnsetType = UNSET
