"""Decodes and checks bodies, and brings chats into one form."""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast

import msgspec

from pinaivu_box.errors import (
    BodyTooLarge,
    InvalidBody,
    InvalidJson,
    quoted,
)
from pinaivu_box.openai.fields import IgnoredFields, drop_unknown
from pinaivu_box.openai.tools import chosen_tools, custom_arguments, functions
from pinaivu_box.openai.types import (
    AssistantMessage,
    ChatRequest,
    Content,
    CustomToolCall,
    JsonFormat,
    Message,
    RefusalPart,
    Sampled,
    SchemaFormat,
    StopStrings,
    TextOrTokens,
    TextPart,
    ToolCall,
    ToolMessage,
)
from pinaivu_box.text import number
from pinaivu_box.value_count import exceeds

Body = TypeVar("Body", bound=msgspec.Struct)


# A body up to this size is decoded on the event loop, in at most a few milliseconds.
SMALL_BODY_BYTES = 64 * 1024
# Limits of what a body holds.  Tokens are numbers, so there may be more of those.
MAX_VALUES = 65_536
MAX_NUMBERS = 524_288
_MAX_DEPTH = 200  # levels of lists and objects


def decode(data: bytes, kind: type[Body], *, strict: bool = False) -> tuple[Body, list[str]]:
    """A body of that kind, and the names of the ignored fields (see `fields`).

    Takes seconds for large bodies.  With `strict`, unknown fields are refused.  Raises InvalidJson,
    InvalidBody, UnsupportedParameter, and BodyTooLarge for too many values.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidJson("The body is nested too deeply.") from error
    if not isinstance(raw, dict):
        raise InvalidBody("the body must be a JSON object", kind="type_error")
    if len(data) > SMALL_BODY_BYTES:  # a smaller one cannot have too many
        check_number_of_values(raw, "The body")
    # What is made from it later is as deep, and is walked by recursion.
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deeper(raw, _MAX_DEPTH):
        raise InvalidJson(f"The body is nested too deeply: the limit is {_MAX_DEPTH} levels.")
    path = _path_of_large_integer(raw, ("body",)) if _MANY_DIGITS.search(data) else None
    if path is not None:
        raise InvalidBody("the number has more than 64 bits", loc=path)
    ignored = IgnoredFields(strict=strict)
    if prepare := getattr(kind, "prepare", None):
        prepare(raw, ignored)
    drop_unknown(raw, kind, ignored)
    try:
        body = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error
    return body, ignored.names


def _is_deeper(raw: Any, max_levels: int) -> bool:
    """Whether there are more than `max_levels` levels of lists and objects."""
    level = [raw]
    for _ in range(max_levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def check_number_of_values(raw: Any, subject: str) -> None:
    """Raises BodyTooLarge."""
    if exceeds(raw, MAX_VALUES, MAX_NUMBERS):
        raise BodyTooLarge(
            f"{subject} has more than {MAX_VALUES} values, or {MAX_NUMBERS} numbers: send fewer "
            "and longer texts, or several requests."
        )


_MANY_DIGITS = re.compile(rb"[0-9]{19}")


def _path_of_large_integer(value: Any, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
    """The path of an integer that neither frames nor stored answers can carry."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    paths = (_path_of_large_integer(item, (*path, key)) for key, item in items)
    return next(filter(None, paths), None)


def text_of(content: Content | list[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def texts_or_tokens(value: TextOrTokens, param: str, max_entries: int) -> list[str | list[int]]:
    """As a list of texts, or of lists of tokens.  Raises InvalidBody."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        value = [cast("list[int]", value)]
    items = [value] if isinstance(value, str) else value
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or int in kinds:
        raise InvalidBody("texts and tokens are mixed", loc=("body", param), kind="type_error")
    if not items or not all(items):
        raise InvalidBody(f"{param} is empty", loc=("body", param))
    if len(items) > max_entries:
        raise InvalidBody(f"{param} has more than {max_entries} entries", loc=("body", param))
    return cast("list[str | list[int]]", items)


def stop_strings(stop: StopStrings | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or [])


def normalise(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form that the engine reads and the receipt covers."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    normal: dict[str, Any] = {
        "role": message.__struct_config__.tag,
        "content": text_of(message.content),
    }
    if message.name is not None:
        normal["name"] = message.name
    if isinstance(message, ToolMessage):
        normal["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            normal["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.refusal and not normal["content"]:
            normal["content"] = message.refusal
        if message.reasoning_content is not None:
            normal["reasoning_content"] = message.reasoning_content
    return normal


def _call(call: ToolCall | CustomToolCall) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        name, arguments = call.function.name, call.function.arguments
    else:
        name, arguments = call.custom.name, custom_arguments(call.custom.input)
    function = {"name": name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def check_stream(body: Sampled) -> None:
    """Raises InvalidBody."""
    if body.stream_options is not None and not body.stream:
        raise _needs("stream_options", "stream to be true")


def check_length(body: Sampled, max_tokens: int | None) -> None:
    """Raises InvalidBody if `min_tokens` is above `max_tokens`."""
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise InvalidBody(
            f"min_tokens is {body.min_tokens} and max_tokens {max_tokens}: lower the first or "
            "raise the second",
            loc=("body", "min_tokens"),
        )


def max_tokens(body: ChatRequest) -> int | None:
    """The lower of the two limits."""
    limits = (body.max_tokens, body.max_completion_tokens)
    return min((limit for limit in limits if limit is not None), default=None)


def check_chat(body: ChatRequest) -> None:
    """Check fields that depend on each other.  Raises InvalidBody."""
    check_stream(body)
    check_length(body, max_tokens(body))
    _check_ending(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise _needs("top_logprobs", "logprobs to be true")
    tools = functions(body.tools or ())
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise InvalidBody("two tools have the same name", loc=("body", "tools"))
    choice, allowed = chosen_tools(body.tool_choice)
    if choice not in ("none", "auto") and not (names if allowed is None else allowed and names):
        raise _needs("tool_choice", "tools to choose from")
    for name in allowed or ():
        if name not in names:
            raise InvalidBody(f"there is no tool '{quoted(name)}'", loc=("body", "tool_choice"))
    formats = body.grammar, isinstance(body.response_format, JsonFormat | SchemaFormat)
    if all(formats):
        raise InvalidBody("grammar and response_format exclude each other", loc=("body", "grammar"))
    if body.grammar and names and body.tool_choice != "none":
        raise InvalidBody("grammar and tools exclude each other", loc=("body", "grammar"))


def _check_ending(body: ChatRequest) -> None:
    if not body.continue_final_message:
        return
    if body.add_generation_prompt:
        raise InvalidBody(
            "continue_final_message and add_generation_prompt exclude each other",
            loc=("body", "continue_final_message"),
        )
    last = body.messages[-1]
    if not isinstance(last, AssistantMessage) or last.tool_calls:
        raise _needs("continue_final_message", "a last message of the assistant without tool calls")


def _needs(name: str, condition: str) -> InvalidBody:
    return InvalidBody(f"{name} needs {condition}", loc=("body", name))


# -- msgspec's validation errors -----------------------------------------------------------------

_MAX_MESSAGE_CHARACTERS = 500  # of each end
_AT = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
_PART = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[([0-9]+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `([A-Za-z0-9_]+)`")
_INVALID_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
_JSON_OF = {"True": "true", "False": "false", "None": "null"}
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def from_validation(error: msgspec.ValidationError, *, root: str = "body") -> InvalidBody:
    """As InvalidBody, with the path in msgspec's message ("Expected `str`, got `int` - at
    `$.messages[0].role`") as its `loc`."""
    text = _shortened(str(error))
    match = _AT.fullmatch(text)
    message, path = (match["message"], match["path"] or "") if match else (text, "")
    loc: list[str | int] = [root]
    for name, index in _PART.findall(path):
        loc.append(name or (index if (position := number(index)) is None else position))
    if missing := _MISSING.fullmatch(message):
        return InvalidBody("field required", loc=(*loc, missing[1]), kind="value_error.missing")
    if unknown := _UNKNOWN.fullmatch(message):
        return InvalidBody(
            f"'{quoted(unknown[1])}' is not a field here: remove it or correct its name",
            loc=(*loc, unknown[1]),
            kind="value_error.extra",
        )
    if invalid := _INVALID_VALUE.fullmatch(message):
        value = _JSON_OF.get(invalid[1], invalid[1])
        return InvalidBody(
            f"{quoted(value)} is not a valid value here", loc=tuple(loc), kind="type_error"
        )
    kind = "value_error" if any(mark in message for mark in ("<", ">", "length")) else "type_error"
    return InvalidBody(message[0].lower() + message[1:], loc=tuple(loc), kind=kind)


def _shortened(message: str) -> str:
    """Without the middle of what it quotes; the path at its end is kept."""
    if len(message) <= 2 * _MAX_MESSAGE_CHARACTERS:
        return message
    return f"{message[:_MAX_MESSAGE_CHARACTERS]}…{message[-_MAX_MESSAGE_CHARACTERS:]}"
