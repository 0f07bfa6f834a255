"""Wire types of the OpenAI API as this box serves it (requests are checked by msgspec)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType


class TextPart(Struct, frozen=True, tag="text", tag_field="type"):
    text: str


# A field is one plain union, so that msgspec's error carries the path of what is wrong in it.
Content = str | list[TextPart]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


StopString = Annotated[str, Meta(min_length=1)]
# RFC 8785, in which proofs are written, carries integers below 2^53 only.
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[str, Meta(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Extension(Struct, frozen=True, forbid_unknown_fields=True):
    """`pinaivu` in a request: what OpenAI's API has no word for.

    `priority` orders the requests of one key among themselves: higher goes first.
    """

    priority: Annotated[int, Meta(ge=-100, le=100)] = 0


class ContextShift(Struct, frozen=True):
    """In an answer whose beginning was forgotten on the way (`engine.context_shift`)."""

    dropped_tokens: int


class ChatRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`.  Every field that is not here is refused by name."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    seed: Seed | None = None
    user: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=300)] | None = None  # as OpenAI's
    # Not OpenAI's but llama.cpp's: go on to max_tokens, for measurements.
    ignore_eos: bool | None = None
    pinaivu: Extension | None = None


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AssistantMessage(Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class Choice(Struct, frozen=True):
    message: AssistantMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class ChatCompletion(Struct, frozen=True):
    id: str
    request_id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    context_shift: ContextShift | UnsetType = UNSET


class ModelInfo(Struct, frozen=True):
    id: str
    created: int
    owned_by: str
    object: str = "model"


class ModelList(Struct, frozen=True):
    request_id: str
    data: list[ModelInfo]
    object: str = "list"


class Delta(Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: None = None


class Chunk(Struct, frozen=True):
    id: str
    request_id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None
    context_shift: ContextShift | UnsetType = UNSET
