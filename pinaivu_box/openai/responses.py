"""Wire types of `/v1/responses`: the request, and its items as messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.openai import parameters
from pinaivu_box.openai.fields import Passed, sift
from pinaivu_box.openai.request import from_validation
from pinaivu_box.openai.tools import (
    Called,
    ResponseCustom,
    ResponseFunction,
    ResponseTool,
    all_names_of,
    as_arguments,
    named,
    names_of,
)
from pinaivu_box.openai.types import (
    MOST_TOOLS,
    AllowedSet,
    AllowedTools,
    Effort,
    Function,
    FunctionName,
    Identifier,
    JsonFormat,
    KeepAlive,
    Metadata,
    NamedTool,
    Probability,
    Schema,
    Text,
    TextFormat,
    Tier,
    TokenCount,
    Tool,
    ToolChoice,
    ToolName,
)

_Id = Annotated[str, Meta(min_length=1, max_length=256)]
_MOST_ITEMS = 16384  # of one request, as many as messages that go to a peer


class ChosenFunction(
    Struct, frozen=True, forbid_unknown_fields=True, tag="function", tag_field="type"
):
    name: FunctionName


class ChosenCustom(Struct, frozen=True, forbid_unknown_fields=True, tag="custom", tag_field="type"):
    name: FunctionName


class ChosenSet(
    Struct, frozen=True, forbid_unknown_fields=True, tag="allowed_tools", tag_field="type"
):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseFunction | ResponseCustom], Meta(max_length=MOST_TOOLS)]


ResponseChoice = (
    Literal["none", "auto", "required"] | ChosenFunction | ChosenCustom | ChosenSet | None
)


class FlatSchemaFormat(
    Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema", tag_field="type"
):
    name: FunctionName
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | JsonFormat | FlatSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: Identifier | None = None
    generate_summary: Identifier | None = None


class ResponseStreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponseRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/responses`.  The items of `input` are checked when they are read."""

    model: Text
    input: str | Annotated[list[dict[str, Any]], Meta(max_length=_MOST_ITEMS)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MOST_TOOLS)] | None = None
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
    def prepare(raw: dict[str, Any], passed: Passed) -> None:
        _take_tools(raw)
        parameters.response(raw, passed)
        if isinstance(raw.get("input"), list):
            raw["input"] = _sifted(raw["input"], passed)


class InputDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # as they are not paid apart here


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
    """Query of `GET /v1/responses/{response_id}`.  With `stream` the events of a response that runs
    in the background come, or has, but for those up to number `starting_after`."""

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
    annotations: Any = None  # of answers that come back
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


_LONGEST_ID = 64  # that a client gives
_LONGEST_ECHO = 65536  # bytes of JSON: tools, or the format of the text
_MOST_THOUGHTS = 1000  # items of them in one response: they are only listed
_STATUSES = ("in_progress", "completed", "incomplete")
_ITEMS: dict[str, type[Struct]] = {
    "message": _MessageItem,
    "function_call": _CallItem,
    "function_call_output": _OutputItem,
    "custom_tool_call": _CustomCallItem,
    "custom_tool_call_output": _OutputItem,
    "reasoning": _ReasoningItem,
}


REFERENCE = "item_reference"
# Items that other servers make of tools which they run themselves.
_SERVER_ITEMS = (
    "web_search_call", "file_search_call", "computer_call", "computer_call_output",
    "code_interpreter_call", "image_generation_call", "mcp_list_tools", "mcp_call",
    "mcp_approval_request", "mcp_approval_response", "compaction", "compaction_trigger",
    "compaction_summary", "tool_search_call", "tool_search_output", "ghost_snapshot",
)  # fmt: skip


def _take_tools(raw: dict[str, Any]) -> None:
    """Tools in items of the input, where Codex has them for some models, are the request's.

    A later one replaces an earlier one of its name.
    """
    given, tools = raw.get("input"), raw.get("tools")
    if not isinstance(given, list) or not isinstance(tools, list | None):
        return
    kept: list[Any] = []
    found: list[Any] = []
    for item in given:
        if not isinstance(item, dict) or item.get("type") != "additional_tools":
            kept.append(item)
            continue
        more = item.get("tools")
        found += more if isinstance(more, list) else [more]
    if len(kept) < len(given):
        later = {_identity(tool): tool for tool in found}
        before = [tool for tool in tools or () if _identity(tool) not in later]
        raw["input"], raw["tools"] = kept, [*before, *later.values()]


def _identity(tool: Any) -> tuple[Any, ...]:
    """What no two tools of a request share: a namespace may have the name of a function."""
    name = tool.get("name") if isinstance(tool, dict) else None
    return (tool.get("type") == "namespace", name) if isinstance(name, str) else (id(tool),)


def _sifted(items: list[Any], passed: Passed) -> list[Any]:
    """Without what means nothing here; `_read` says what is wrong with the rest."""
    kept = []
    for place, item in enumerate(items):
        if not isinstance(item, dict):
            kept.append(item)
            continue
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind in _SERVER_ITEMS:
            passed.over("input", place, str(kind))
            continue
        if kind == "function_call":
            item["arguments"] = parameters.text_of_arguments(item.get("arguments"))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            item["output"] = parameters.text_of_result(item.get("output"))
        if isinstance(kind, str) and kind in _ITEMS:
            sift(item, _ITEMS[kind], passed, ("input", place))
        kept.append(item)
    return kept


def referred(item: dict[str, Any]) -> str | None:
    """The id of the item that this one stands for."""
    if item.get("type") == REFERENCE or set(item) == {"id"} or set(item) == {"id", "type"}:
        found = item.get("id") if item.get("type") in (REFERENCE, None) else None
        return found if isinstance(found, str) else None
    return None


def as_items(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`input` as a list of items."""
    if isinstance(given, str):
        part = {"type": "input_text", "text": given}
        return [{"type": "message", "role": "user", "content": [part]}]
    return [
        {**item, "type": item.get("type") or "message"} if "role" in item else item
        for item in given
    ]


def as_messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as the messages of a chat.  Raises InvalidBody."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        _append(messages, _read(item, number))
    return messages


def as_stored(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items with what a later request needs of them, and what names them; all else that a client
    has sent was ignored, and is not kept.  Raises InvalidBody."""
    made, thoughts = [], 0
    for number, item in enumerate(items):
        read = _read(item, number)
        thoughts += isinstance(read, _ReasoningItem)
        if thoughts <= _MOST_THOUGHTS or not isinstance(read, _ReasoningItem):
            made.append({**_named(item), **_kept(read)})
    return made


def stored_form(response: ResponseObject) -> ResponseObject:
    """As it is stored: without tools and schemas that are long, which no later request needs."""
    text = response.text
    if len(msgspec.json.encode(text)) > _LONGEST_ECHO:
        text = {**text, "format": {**text["format"], "schema": {}, "description": None}}
    tools = response.tools if len(msgspec.json.encode(response.tools)) <= _LONGEST_ECHO else []
    return msgspec.structs.replace(response, text=text, tools=tools)


def _read(item: dict[str, Any], number: int) -> Struct:
    called = item.get("type")
    kind = _ITEMS.get(called) if isinstance(called, str) else None
    if kind is None:
        shown = quoted(called) if isinstance(called, str) else None
        raise InvalidBody(
            f"items of type '{shown}' are not served; {', '.join(_ITEMS)} are",
            loc=("body", "input", number, "type"),
        )
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error


def _named(item: dict[str, Any]) -> dict[str, Any]:
    """Its type, and its id and status if they are any."""
    made = {"type": item["type"]}
    if isinstance(item.get("id"), str) and len(item["id"]) <= _LONGEST_ID:
        made["id"] = item["id"]
    if item.get("status") in _STATUSES:
        made["status"] = item["status"]
    return made


def _kept(item: Struct) -> dict[str, Any]:
    match item:
        case _MessageItem(role, content):
            if isinstance(content, str):
                content = [
                    _ContentPart("output_text" if role == "assistant" else "input_text", content)
                ]
            return {"role": role, "content": _kept_content(content)}
        case _OutputItem(call_id, output):
            return {"call_id": call_id, "output": _kept_content(output)}
        case _CallItem(call_id, name, arguments, namespace):
            more = {"namespace": namespace} if namespace else {}
            return {"call_id": call_id, "name": name, "arguments": arguments, **more}
        case _CustomCallItem(call_id, name, given, namespace):
            more = {"namespace": namespace} if namespace else {}
            return {"call_id": call_id, "name": name, "input": given, **more}
    return {"summary": []}  # thoughts are never read again


def _kept_content(content: _Content) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    made: list[dict[str, Any]] = []
    for part in content:
        if not (part.text or part.refusal):
            continue
        name = "refusal" if part.type == "refusal" else "text"
        more: dict[str, Any] = {"annotations": []} if part.type == "output_text" else {}
        made.append({"type": part.type, name: part.text or part.refusal, **more})
    return made


def _append(messages: list[dict[str, Any]], item: Struct) -> None:
    match item:
        case _MessageItem(role, content):
            messages.append({"role": role, "content": _text(content)})
        case _OutputItem(call_id, output):
            messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(output)})
        case _CallItem(call_id, name, arguments, namespace):
            _append_call(messages, call_id, named(name, namespace), arguments)
        case _CustomCallItem(call_id, name, given, namespace):
            _append_call(messages, call_id, named(name, namespace), as_arguments(given))


def _append_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Calls of one turn are one message, also after what was said before them."""
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: _Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal for part in content)


def chat_choice(choice: ResponseChoice, known: Mapping[str, Called]) -> ToolChoice | None:
    """The same choice of a chat's tools."""
    match choice:
        case ChosenFunction(name) | ChosenCustom(name):
            return NamedTool(ToolName(names_of(name, known)[0]))
        case ChosenSet(mode, tools):
            names = all_names_of({one.name for one in tools}, known)
            return AllowedTools(AllowedSet(mode, [Tool(Function(name)) for name in names]))
    return choice
