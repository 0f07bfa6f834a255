"""Wire types of chat completions, and those that other endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.engine.messages import (
    LogitBias,
    MinP,
    MinTokens,
    Penalty,
    RepeatPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)
from pinaivu_box.openai import parameters
from pinaivu_box.text import whole

Text = Annotated[str, Meta(min_length=1)]
Identifier = Annotated[str, Meta(max_length=512)]  # of a user or a cache; stored or echoed


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of objects without unknown fields; those of a body are removed first (see `fields`)."""


class Typed(Strict, frozen=True, tag_field="type"):
    """Base of objects that are told apart by their `type`."""


class ModelRequest(Strict, frozen=True):
    """Base of the bodies that name a model.  Their `prepare`, if they have one, converts the names
    and values of other servers (see `parameters`)."""

    model: Text


class TextPart(Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class RefusalPart(Struct, frozen=True, tag="refusal", tag_field="type"):
    """Part of a message of the assistant."""

    refusal: str


class ImageUrl(Strict, frozen=True):
    """`url` is a `data:` URL, or that of a server from which the operator lets images be had;
    `detail` has no effect."""

    url: Text
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Struct, frozen=True, tag="image_url", tag_field="type"):
    """Some clients send the URL alone."""

    image_url: ImageUrl | Text


# Plain unions, so that msgspec's errors carry the path to what is invalid in them.
Content = str | list[TextPart]
ContentWithImages = str | list[TextPart | ImagePart]


class _Message(Strict, frozen=True, tag_field="role", kw_only=True):
    name: str | None = None


class SystemMessage(_Message, frozen=True, tag="system"):
    content: Content


class DeveloperMessage(_Message, frozen=True, tag="developer"):
    content: Content


class UserMessage(_Message, frozen=True, tag="user"):
    content: ContentWithImages


class CalledFunction(Strict, frozen=True):
    """`arguments` is the text of a model, which may be invalid JSON."""

    name: str
    arguments: str


class CalledCustom(Strict, frozen=True):
    name: Text
    input: str


class ToolCall(Typed, frozen=True, tag="function"):
    id: str
    function: CalledFunction
    index: int | UnsetType | None = UNSET  # clients that add up deltas send it back


class CustomToolCall(Typed, frozen=True, tag="custom"):
    id: str
    custom: CalledCustom
    index: int | UnsetType | None = UNSET


class AssistantMessage(_Message, frozen=True, tag="assistant", kw_only=True):
    """Clients send answers back with all their fields, also those that are null."""

    content: str | list[TextPart | RefusalPart] | None = None
    tool_calls: list[ToolCall | CustomToolCall] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(_Message, frozen=True, tag="tool", kw_only=True):
    content: ContentWithImages
    tool_call_id: str


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class StreamOptions(Strict, frozen=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None  # padding, which this box does not add


FunctionName = Annotated[str, Meta(pattern=whole("[a-zA-Z0-9_.:-]{1,128}"))]
Schema = dict[str, Any]


class Function(Strict, frozen=True):
    """`parameters` is a JSON schema; with `strict` all of it is enforced."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Typed, frozen=True, tag="function"):
    function: Function


class TextFormat(Typed, frozen=True, tag="text"):
    pass


class Rule(Strict, frozen=True):
    """A grammar of the text that a custom tool takes."""

    syntax: Literal["lark", "regex"]
    definition: Text


class RuleFormat(Typed, frozen=True, tag="grammar"):
    grammar: Rule


class CustomDefinition(Strict, frozen=True):
    name: FunctionName
    description: str | None = None
    format: TextFormat | RuleFormat | None = None


class CustomTool(Typed, frozen=True, tag="custom"):
    """A tool that takes text, not arguments."""

    custom: CustomDefinition


class ToolName(Strict, frozen=True):
    name: FunctionName


class NamedTool(Typed, frozen=True, tag="function"):
    function: ToolName


class NamedCustom(Typed, frozen=True, tag="custom"):
    custom: ToolName


class AllowedSet(Strict, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[Tool | CustomTool], Meta(max_length=MAX_TOOLS)]


class AllowedTools(Typed, frozen=True, tag="allowed_tools"):
    """The model sees all tools and may call only these."""

    allowed_tools: AllowedSet


ToolChoice = Literal["none", "auto", "required"] | NamedTool | NamedCustom | AllowedTools


class JsonFormat(Typed, frozen=True, tag="json_object"):
    pass


class NamedSchema(Strict, frozen=True):
    name: FunctionName
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Typed, frozen=True, tag="json_schema"):
    json_schema: NamedSchema


class Prediction(Typed, frozen=True, tag="content"):
    content: Content


# The text of each token is compared with them, so their size is limited.
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
# Proofs are written as RFC 8785, which carries only integers below 2^53.
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Extension(Strict, frozen=True):
    """`pinaivu` in a request: what OpenAI's API has no field for.

    `priority` orders the requests of one key among themselves: higher goes first.  A request that
    cannot start within `timeout` seconds is refused.
    """

    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None


# How long the model stays loaded after the request: seconds, or "5m"; negative for no limit.
KeepAlive = float | Annotated[str, Meta(max_length=40)]


class ContextShift(Struct, frozen=True):
    """In an answer during which the oldest tokens were dropped (`engine.context_shift`)."""

    dropped_tokens: int


Choices = Annotated[int, Meta(ge=1, le=128)]
MAX_STOP_STRINGS = 64
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
MAX_TOOLS = 1024
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Tier = Literal["auto", "default", "flex", "priority", "scale"]
# Sixteen pairs of strings, as OpenAI documents it.
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]


# Further variables of the model's template; the limits are those of a leg on a peer.
TemplateVariables = Annotated[
    dict[
        Annotated[str, Meta(max_length=256)],
        bool | int | float | Annotated[str, Meta(max_length=256)],
    ],
    Meta(max_length=12),
]


class Sampled(ModelRequest, frozen=True, kw_only=True):
    """The fields that chat and completion requests share; those of `SamplingParams` have its names
    and bounds."""

    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: TokenCount | None = None
    stop: StopStrings | None = None
    seed: Seed | None = None
    user: Identifier | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    # llama.cpp's.
    top_k: TopK | None = None
    min_p: MinP | None = None
    typical_p: TypicalP | None = None
    repeat_penalty: RepeatPenalty | None = None
    grammar: Text | None = None  # GBNF, or Lark as llguidance reads it
    ignore_eos: bool | None = None
    min_tokens: MinTokens | None = None  # vLLM's
    cache_prompt: bool | None = None
    keep_alive: KeepAlive | None = None  # Ollama's
    pinaivu: Extension | None = None


class ChatRequest(Sampled, frozen=True, kw_only=True):
    """Body of `POST /v1/chat/completions`.  Names of other servers are accepted; unknown
    fields are ignored and reported."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    tools: Annotated[list[Tool | CustomTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    prediction: Prediction | None = None
    service_tier: Tier | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None
    # As vLLM's.
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    prepare = staticmethod(parameters.chat)


# Text or tokens, or a list of them; msgspec allows one type of list in a union.
OneToken = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TextOrTokens = str | list[str | OneToken | list[OneToken]]


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct, frozen=True):
    """`token` is the text of `bytes`; a part of a character is written as OpenAI does: `\\xf0`."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprobs(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct, frozen=True):
    content: list[TokenLogprobs]
    refusal: None = None


class Answer(Struct, frozen=True, omit_defaults=True):
    """The message of a choice."""

    content: str | None
    role: str
    refusal: None
    tool_calls: list[ToolCall | CustomToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class Choice(Struct, frozen=True):
    index: int
    message: Answer
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(Struct, frozen=True):
    id: str
    request_id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    service_tier: str | UnsetType = UNSET
    context_shift: ContextShift | UnsetType = UNSET
    ignored_parameters: list[str] | UnsetType = UNSET


class Modalities(Struct, frozen=True):
    """What a model reads and writes, under OpenRouter's names: "text", "image"."""

    input_modalities: list[str]
    output_modalities: list[str]


class ModelInfo(Struct, frozen=True):
    """`alias_of` is the id of the model that an alias leads to.  `exactness` is that of the engines
    that it has now, if the same request gives the same bits there whatever else they compute."""

    id: str
    created: int
    owned_by: str
    architecture: Modalities
    object: str = "model"
    alias_of: str | UnsetType = UNSET
    exactness: str | UnsetType = UNSET


class ModelList(Struct, frozen=True):
    request_id: str
    data: list[ModelInfo]
    object: str = "list"
