"""What servers with OpenAI's API answer, as far as it is read: every field may be missing, and what
is not here is passed over.  Servers differ in it: vLLM and llama-server call thoughts
`reasoning_content`, others `reasoning`; a server that does not stream sends a `message`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct, field

_Count = Annotated[int, Meta(ge=0, lt=2**31)]


class UpstreamFunction(Struct):
    name: str | None = None
    arguments: str | None = None


class UpstreamCall(Struct):
    index: int | None = None
    id: str | None = None
    function: UpstreamFunction | None = None


class Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[UpstreamCall] | None = None


class Likely(Struct):
    token: str
    logprob: float | None = None
    spelling: list[Annotated[int, Meta(ge=0, le=255)]] | None = field(default=None, name="bytes")

    @property
    def text(self) -> bytes:
        return self.token.encode() if self.spelling is None else bytes(self.spelling)


class LikelyToken(Likely):
    top_logprobs: list[Likely] | None = None


class Logprobs(Struct):
    """`content` of a chat; the others of a completion, unless its server sends `content` there."""

    content: list[LikelyToken] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class UpstreamChoice(Struct):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # vLLM: the stop string, or a token


class UpstreamPromptDetails(Struct):
    cached_tokens: _Count | None = None


class UpstreamUsage(Struct):
    prompt_tokens: _Count = 0
    completion_tokens: _Count | None = None
    prompt_tokens_details: UpstreamPromptDetails | None = None


class Chunk(Struct):
    """`error`, or an `object` of that name, in a stream says that it has failed."""

    choices: list[UpstreamChoice] = []
    usage: UpstreamUsage | None = None
    system_fingerprint: str | None = None
    object: str = ""
    error: Any = None


class Embedding(Struct):
    embedding: list[float]
    index: int | None = None


class Embeddings(Struct):
    data: list[Embedding]
    usage: UpstreamUsage | None = None


class ListedModel(Struct):
    """`max_model_len` is vLLM's and SGLang's, `context_length` of other providers."""

    id: str
    max_model_len: _Count | None = None
    context_length: _Count | None = None
    meta: Any = None  # llama-server's
    owned_by: Any = None

    @property
    def context(self) -> int:
        """The number of tokens, 0 if it does not say."""
        meta = self.meta.get("n_ctx") if isinstance(self.meta, dict) else None
        return self.max_model_len or self.context_length or (meta if isinstance(meta, int) else 0)


class UpstreamModels(Struct):
    data: list[ListedModel]
