"""Wire types of `/v1/completions`, of tokenizing, and of counting before paying."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.openai import parameters
from pinaivu_box.openai.fields import IgnoredFields
from pinaivu_box.openai.types import ContextShift, Sampled, Text, TextOrTokens, Usage

Tokens = Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """Body of `POST /v1/completions`: a prompt as text or tokens, or a list of such.

    `max_tokens` 0 asks for the prompt alone, with `echo`; -1 for as many as there is room for.
    """

    prompt: TextOrTokens
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None

    @staticmethod
    def prepare(raw: dict[str, Any], ignored: IgnoredFields) -> None:
        parameters.completion(raw, ignored)


class CompletionLogprobs(Struct, frozen=True):
    """`text_offset` in characters of the choice's text.  An echoed prompt's first token has no
    log-probability.  `top_logprobs` also has the token itself."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None


class Completion(Struct, frozen=True):
    """Also a chunk of a stream."""

    id: str
    request_id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
    system_fingerprint: str | None = None
    context_shift: ContextShift | UnsetType = UNSET
    ignored_parameters: list[str] | UnsetType = UNSET


class TokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/tokenize`; with `special` as a prompt: special tokens in `text` are
    recognised, and the model's beginning of a text is added."""

    model: Text
    text: str
    special: bool = False


class DetokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    model: Text
    tokens: Tokens


class TokenList(Struct, frozen=True):
    request_id: str
    model: str
    tokens: list[int]
    count: int
    ignored_parameters: list[str] | UnsetType = UNSET


class DetokenizedText(Struct, frozen=True):
    request_id: str
    model: str
    text: str
    ignored_parameters: list[str] | UnsetType = UNSET


class InputTokens(Struct, frozen=True):
    """How many tokens a chat request's prompt has."""

    request_id: str
    model: str
    input_tokens: int
    object: str = "chat.completion.input_tokens"
    ignored_parameters: list[str] | UnsetType = UNSET
