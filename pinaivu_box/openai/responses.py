"""Wire types of `/v1/responses`, and its items as messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.engine.messages import Temperature, TopP
from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.openai import parameters
from pinaivu_box.openai.decoding import from_validation
from pinaivu_box.openai.fields import IgnoredFields, drop_unknown
from pinaivu_box.openai.tools import (
    ClientTool,
    ResponseCustom,
    ResponseFunction,
    ResponseTool,
    custom_arguments,
    function_call,
    model_name,
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
    Text,
    TextFormat,
    Tier,
    TokenCount,
    Tool,
    ToolChoice,
    ToolName,
    Typed,
)

_Id = Annotated[str, Meta(min_length=1, max_length=256)]
_MAX_ITEMS = 16384  # of one request: as many as the messages that a peer accepts


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
        _take_tools(raw)
        parameters.response(raw, ignored)
        if isinstance(raw.get("input"), list):
            raw["input"] = _known_items(raw["input"], ignored)


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


# -- items -----------------------------------------------------------------------------------------


class _ContentPart(Struct, frozen=True):
    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str = ""
    annotations: Any = None  # present in answers that are sent back
    logprobs: Any = None


_Content = str | list[_ContentPart]


class _Item(Struct, frozen=True, kw_only=True):
    type: Any = None
    id: Any = None
    status: Any = None


class _MessageItem(_Item, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content


class _CallItem(_Item, frozen=True):
    call_id: _Id
    name: Text
    arguments: str
    namespace: str | None = None


class _CustomCallItem(_Item, frozen=True):
    call_id: _Id
    name: Text
    input: str
    namespace: str | None = None


class _OutputItem(_Item, frozen=True):
    call_id: _Id
    output: _Content


class _ReasoningItem(_Item, frozen=True):
    content: list[_ContentPart] | None = None
    summary: Any = None


_MAX_ID_CHARACTERS = 64  # of an id that a client has chosen
_MAX_ECHO_BYTES = 65536  # of tools, or of the text format, in a stored response
_MAX_REASONING_ITEMS = 1000  # stored with one response: they are only listed
_STATUSES = ("in_progress", "completed", "incomplete")
_ITEMS: dict[str, type[Struct]] = {
    "message": _MessageItem,
    "function_call": _CallItem,
    "function_call_output": _OutputItem,
    "custom_tool_call": _CustomCallItem,
    "custom_tool_call_output": _OutputItem,
    "reasoning": _ReasoningItem,
}


# Items about tools that other servers run themselves.
_SERVER_ITEMS = (
    "web_search_call", "file_search_call", "computer_call", "computer_call_output",
    "code_interpreter_call", "image_generation_call", "mcp_list_tools", "mcp_call",
    "mcp_approval_request", "mcp_approval_response", "compaction", "compaction_trigger",
    "compaction_summary", "tool_search_call", "tool_search_output", "ghost_snapshot",
)  # fmt: skip


def _take_tools(raw: dict[str, Any]) -> None:
    """Move tools in items of the input, where Codex sends them for some models, to the request's.

    A later one replaces an earlier one with the same name.
    """
    items, tools = raw.get("input"), raw.get("tools")
    if not isinstance(items, list) or not isinstance(tools, list | None):
        return
    other_items: list[Any] = []
    additional: list[Any] = []
    for item in items:
        if not isinstance(item, dict) or item.get("type") != "additional_tools":
            other_items.append(item)
            continue
        more = item.get("tools")
        additional += more if isinstance(more, list) else [more]
    if len(other_items) < len(items):
        replacing = {_identity(tool): tool for tool in additional}
        before = [tool for tool in tools or () if _identity(tool) not in replacing]
        raw["input"], raw["tools"] = other_items, [*before, *replacing.values()]


def _identity(tool: Any) -> tuple[Any, ...]:
    """Equal for tools that replace each other; a namespace may have the name of a function."""
    name = tool.get("name") if isinstance(tool, dict) else None
    return (tool.get("type") == "namespace", name) if isinstance(name, str) else (id(tool),)


def _known_items(items: list[Any], ignored: IgnoredFields) -> list[Any]:
    """Without items and fields that have no meaning here; `_typed` checks the rest."""
    known = []
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            known.append(item)
            continue
        if "role" in item and not item.get("type"):
            item["type"] = "message"
        kind = item.get("type")
        if kind in _SERVER_ITEMS:
            ignored.add("input", number, str(kind))
            continue
        if kind == "function_call":
            item["arguments"] = parameters.text_of_arguments(item.get("arguments"))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            item["output"] = parameters.text_of_result(item.get("output"))
        if isinstance(kind, str) and kind in _ITEMS:
            drop_unknown(item, _ITEMS[kind], ignored, ("input", number))
        known.append(item)
    return known


def referenced_id(item: dict[str, Any]) -> str | None:
    """The id of the item that this one refers to; None if it is no reference."""
    untyped = item.get("type") is None and set(item) <= {"id", "type"}
    item_id = item.get("id") if untyped or item.get("type") == "item_reference" else None
    return item_id if isinstance(item_id, str) else None


def as_items(items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`input` as a list of items."""
    if isinstance(items, str):
        part = {"type": "input_text", "text": items}
        return [{"type": "message", "role": "user", "content": [part]}]
    return items


def as_messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as the messages of a chat.  Raises InvalidBody."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        _append(messages, _typed(item, number))
    return messages


def as_stored(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items with their names and what a later request needs of them; other fields had no effect and
    are not stored.  Raises InvalidBody."""
    stored, reasoning_items = [], 0
    for number, item in enumerate(items):
        typed = _typed(item, number)
        reasoning_items += isinstance(typed, _ReasoningItem)
        if reasoning_items <= _MAX_REASONING_ITEMS or not isinstance(typed, _ReasoningItem):
            stored.append({**_head(item), **_content(typed)})
    return stored


def stored_form(response: ResponseObject) -> ResponseObject:
    """As it is stored: without long tools and schemas, which no later request needs."""
    text = response.text
    if len(msgspec.json.encode(text)) > _MAX_ECHO_BYTES:
        text = {**text, "format": {**text["format"], "schema": {}, "description": None}}
    tools = response.tools if len(msgspec.json.encode(response.tools)) <= _MAX_ECHO_BYTES else []
    return msgspec.structs.replace(response, text=text, tools=tools)


def _typed(item: dict[str, Any], number: int) -> Struct:
    """Raises InvalidBody."""
    item_type = item.get("type")
    kind = _ITEMS.get(item_type) if isinstance(item_type, str) else None
    if kind is None:
        name = quoted(item_type) if isinstance(item_type, str) else None
        raise InvalidBody(
            f"items of type '{name}' are not supported; use {', '.join(_ITEMS)}",
            loc=("body", "input", number, "type"),
        )
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error


def _head(item: dict[str, Any]) -> dict[str, Any]:
    """Its type, and its id and status if they are valid."""
    head = {"type": item["type"]}
    if isinstance(item.get("id"), str) and len(item["id"]) <= _MAX_ID_CHARACTERS:
        head["id"] = item["id"]
    if item.get("status") in _STATUSES:
        head["status"] = item["status"]
    return head


def _content(item: Struct) -> dict[str, Any]:
    match item:
        case _MessageItem(role, content):
            if isinstance(content, str):
                content = [
                    _ContentPart("output_text" if role == "assistant" else "input_text", content)
                ]
            return {"role": role, "content": _stored_parts(content)}
        case _OutputItem(call_id, output):
            return {"call_id": call_id, "output": _stored_parts(output)}
        case _CallItem(call_id, name, arguments, namespace):
            more = {"namespace": namespace} if namespace else {}
            return {"call_id": call_id, "name": name, "arguments": arguments, **more}
        case _CustomCallItem(call_id, name, text, namespace):
            more = {"namespace": namespace} if namespace else {}
            return {"call_id": call_id, "name": name, "input": text, **more}
    return {"summary": []}  # reasoning is never read again


def _stored_parts(content: _Content) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if not (part.text or part.refusal):
            continue
        name = "refusal" if part.type == "refusal" else "text"
        more: dict[str, Any] = {"annotations": []} if part.type == "output_text" else {}
        parts.append({"type": part.type, name: part.text or part.refusal, **more})
    return parts


def _append(messages: list[dict[str, Any]], item: Struct) -> None:
    match item:
        case _MessageItem(role, content):
            messages.append({"role": role, "content": _text(content)})
        case _OutputItem(call_id, output):
            messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(output)})
        case _CallItem(call_id, name, arguments, namespace):
            _append_call(messages, call_id, model_name(name, namespace), arguments)
        case _CustomCallItem(call_id, name, text, namespace):
            _append_call(messages, call_id, model_name(name, namespace), custom_arguments(text))


def _append_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Calls of one turn join one message, also with the text before them."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(function_call(call_id, name, arguments))


def _text(content: _Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal for part in content)


def chat_choice(choice: ResponseChoice, tools: Mapping[str, ClientTool]) -> ToolChoice | None:
    """The same choice among the tools of a chat."""
    match choice:
        case ChosenFunction(name) | ChosenCustom(name):
            return NamedTool(ToolName(model_names({name}, tools)[0]))
        case ChosenSet(mode, chosen):
            names = model_names({tool.name for tool in chosen}, tools)
            return AllowedTools(AllowedSet(mode, [Tool(Function(name)) for name in names]))
    return choice
