"""The items of a response's input: what they may be, and how they become messages of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.openai import parameters
from pinaivu_box.openai.decoding import from_validation
from pinaivu_box.openai.fields import IgnoredFields, drop_unknown
from pinaivu_box.openai.images import Part, content_of, image_part
from pinaivu_box.openai.tools import custom_arguments, function_call, model_name
from pinaivu_box.openai.types import Text

_Id = Annotated[str, Meta(min_length=1, max_length=256)]


class _ContentPart(Struct, frozen=True):
    type: Literal[
        "input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text",
        "input_image",
    ]  # fmt: skip
    text: str = ""
    refusal: str = ""
    image_url: str | None = None
    detail: Any = None
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


def take_tools(raw: dict[str, Any]) -> None:
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


def known_items(items: list[Any], ignored: IgnoredFields) -> list[Any]:
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
        _without_details(item, ("input", number), ignored)
        if isinstance(kind, str) and kind in _ITEMS:
            drop_unknown(item, _ITEMS[kind], ignored, ("input", number))
        known.append(item)
    return known


def _without_details(
    item: dict[str, Any], path: tuple[str | int, ...], ignored: IgnoredFields
) -> None:
    for field in ("content", "output"):
        parts = item.get(field)
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict) and part.get("type") == "input_image":
                parameters.without_detail(part, ignored, *path, field, place)


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
        _append(messages, _typed(item, number), number)
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
        if part.image_url:
            parts.append({"type": part.type, "image_url": part.image_url, "detail": "auto"})
        if not (part.text or part.refusal):
            continue
        name = "refusal" if part.type == "refusal" else "text"
        more: dict[str, Any] = {"annotations": []} if part.type == "output_text" else {}
        parts.append({"type": part.type, name: part.text or part.refusal, **more})
    return parts


def _append(messages: list[dict[str, Any]], item: Struct, number: int) -> None:
    match item:
        case _MessageItem("user", content):
            messages.append({"role": "user", "content": _seen(content, number, "content")})
        case _MessageItem(role, content):
            messages.append({"role": role, "content": _text(content, number)})
        case _OutputItem(call_id, output):
            result = _seen(output, number, "output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
        case _CallItem(call_id, name, arguments, namespace):
            _append_call(messages, call_id, model_name(name, namespace), arguments)
        case _CustomCallItem(call_id, name, text, namespace):
            _append_call(messages, call_id, model_name(name, namespace), custom_arguments(text))


def _append_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Calls of one turn join one message, also with the text before them."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(function_call(call_id, name, arguments))


def _text(content: _Content, number: int) -> str:
    """Raises InvalidBody if there is an image in it."""
    seen = _seen(content, number, "content")
    if isinstance(seen, str):
        return seen
    raise InvalidBody(
        "images may only be in messages of the user and in results of calls",
        loc=("body", "input", number, "content"),
    )


def _seen(content: _Content, number: int, field: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    at = ("input", number, field)
    return content_of([_part(part, *at, place) for place, part in enumerate(content)])


def _part(part: _ContentPart, *at: str | int) -> Part:
    """Raises InvalidBody."""
    if part.type != "input_image":
        return part.text or part.refusal
    if not part.image_url:
        raise InvalidBody(
            "this box stores no files: give the image as image_url", loc=("body", *at)
        )
    return image_part(part.image_url, *at, "image_url")
