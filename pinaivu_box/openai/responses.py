"""Wire types of `/v1/responses`; `response_input` has those of the items of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.engine.messages import Temperature, TopP
from pinaivu_box.openai import parameters
from pinaivu_box.openai.fields import IgnoredFields
from pinaivu_box.openai.response_input import known_items, take_tools
from pinaivu_box.openai.tools import (
    ClientTool,
    ResponseCustom,
    ResponseFunction,
    ResponseTool,
    model_names,
)
from pinaivu_box.openai.types import (
    MAX_TOOLS,
    AllowedSet,
    AllowedTools,
    Effort,
    Function,
    FunctionName,
    Identifier,
    JsonFormat,
    KeepAlive,
    Metadata,
    ModelRequest,
    NamedSchema,
    NamedTool,
    Strict,
    TextFormat,
    Tier,
    TokenCount,
    Tool,
    ToolChoice,
    ToolName,
    Typed,
)

_MAX_ITEMS = 16384  # of one request: as many as the messages that a peer accepts
_MAX_ECHO_BYTES = 65536  # of tools, or of the text format, in a stored response


class ChosenFunction(Typed, frozen=True, tag="function"):
    name: FunctionName


class ChosenCustom(Typed, frozen=True, tag="custom"):
    name: FunctionName


class ChosenSet(Typed, frozen=True, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseFunction | ResponseCustom], Meta(max_length=MAX_TOOLS)]


ResponseChoice = (
    Literal["none", "auto", "required"] | ChosenFunction | ChosenCustom | ChosenSet | None
)


class FlatSchemaFormat(NamedSchema, frozen=True, tag="json_schema", tag_field="type"):
    pass


class TextOptions(Strict, frozen=True):
    format: TextFormat | JsonFormat | FlatSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict, frozen=True):
    effort: Effort | None = None
    summary: Identifier | None = None
    generate_summary: Identifier | None = None


class ResponseStreamOptions(Strict, frozen=True):
    include_obfuscation: bool | None = None


class ResponseRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/responses`.  The items of `input` are checked when they are read."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=_MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseChoice = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Metadata | None = None
    user: Identifier | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    service_tier: Tier | None = None
    background: bool | None = None
    conversation: None = None
    max_tool_calls: None = None
    prompt: None = None
    prompt_cache_key: Identifier | None = None
    safety_identifier: Identifier | None = None
    keep_alive: KeepAlive | None = None

    @staticmethod
    def prepare(raw: dict[str, Any], ignored: IgnoredFields) -> None:
        take_tools(raw)
        parameters.response(raw, ignored)
        if isinstance(raw.get("input"), list):
            raw["input"] = known_items(raw["input"], ignored)


class InputDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # they have no price of their own here


class OutputDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseObject(Struct, frozen=True, kw_only=True):
    """The answer, also as it is stored.  `created_at` in Unix seconds."""

    id: str
    request_id: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    reasoning: dict[str, Any]
    service_tier: str | None = None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str = "disabled"
    user: str | None = None
    background: bool = False
    ignored_parameters: list[str] = []
    object: str = "response"


class Retrieve(Struct, frozen=True):
    """Query of `GET /v1/responses/{response_id}`.  `stream` asks for the events of a response that
    was created with background, after number `starting_after`."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=-1)] = -1


class DeletedResponse(Struct, frozen=True):
    request_id: str
    id: str
    deleted: bool = True
    object: str = "response"


class ItemList(Struct, frozen=True):
    request_id: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


def stored_form(response: ResponseObject) -> ResponseObject:
    """As it is stored: without long tools and schemas, which no later request needs."""
    text = response.text
    if len(msgspec.json.encode(text)) > _MAX_ECHO_BYTES:
        text = {**text, "format": {**text["format"], "schema": {}, "description": None}}
    tools = response.tools if len(msgspec.json.encode(response.tools)) <= _MAX_ECHO_BYTES else []
    return msgspec.structs.replace(response, text=text, tools=tools)


def chat_choice(choice: ResponseChoice, tools: Mapping[str, ClientTool]) -> ToolChoice | None:
    """The same choice among the tools of a chat."""
    match choice:
        case ChosenFunction(name) | ChosenCustom(name):
            return NamedTool(ToolName(model_names({name}, tools)[0]))
        case ChosenSet(mode, chosen):
            names = model_names({tool.name for tool in chosen}, tools)
            return AllowedTools(AllowedSet(mode, [Tool(Function(name)) for name in names]))
    return choice
