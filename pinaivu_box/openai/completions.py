"""Wire types of `/v1/completions`, `/v1/tokenize`, `/v1/detokenize` and the token count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.openai import parameters
from pinaivu_box.openai.types import ContextShift, ModelRequest, Sampled, TextOrTokens, Usage

Tokens = Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """Body of `POST /v1/completions`: a prompt as text or tokens, or a list of them.

    `max_tokens` 0 (with `echo`) returns the prompt alone; -1 sets no limit but the context.
    """

    prompt: TextOrTokens
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    prepare = staticmethod(parameters.completion)


class CompletionLogprobs(Struct, frozen=True):
    """`text_offset` counts characters of the choice's text.  `top_logprobs` includes the token
    itself.  The first token of an echoed prompt has no log-probability."""

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
    """An answer, or a chunk of a stream."""

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


class TokenizeRequest(ModelRequest, frozen=True):
    """Body of `POST /v1/tokenize`.  With `special` the text is read like a prompt: special tokens
    are recognised, and the model's BOS token is added."""

    text: str
    special: bool = False


class DetokenizeRequest(ModelRequest, frozen=True):
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
    """The number of tokens in the prompt of a chat."""

    request_id: str
    model: str
    input_tokens: int
    object: str = "chat.completion.input_tokens"
    ignored_parameters: list[str] | UnsetType = UNSET


def shown_token(token: bytes) -> str:
    """The text of a token; a part of a character is written as OpenAI does (`bytes:\\xf0`), so that
    different tokens have different names."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def shown_likeliest(
    token: bytes, logprob: float, top: Iterable[tuple[bytes, float]]
) -> dict[str, float]:
    """The log-probabilities of the likeliest tokens and the token itself, each once."""
    by_name: dict[str, float] = {}
    for other, value in [*top, (token, logprob)]:
        by_name.setdefault(shown_token(other), value)
    return by_name
