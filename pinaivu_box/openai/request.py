"""The body of a chat request: decoded, checked, and brought into one form."""

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
from pinaivu_box.openai.fields import Passed, sift
from pinaivu_box.openai.tools import as_arguments, functions, wanted
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

Body = TypeVar("Body", bound=msgspec.Struct)


# Up to so many bytes a body is decoded where it is wanted: that takes a few milliseconds at most.
SMALL = 64 * 1024
# What a body may hold.  Tokens are numbers, so of those there may be more.
MOST_VALUES = 65_536
MOST_NUMBERS = 524_288
_DEEPEST = 200  # levels of lists and objects


def decode(data: bytes, kind: type[Body], *, strict: bool = False) -> tuple[Body, list[str]]:
    """A body of that kind, and the names of what was passed over (see `fields`).

    Raises InvalidJson, InvalidBody, UnsupportedParameter, and BodyTooLarge for more values than are
    taken.  With `strict`, what would be passed over is refused.  What is not SMALL may take
    seconds.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidJson("The body is nested too deeply.") from error
    if not isinstance(raw, dict):
        raise InvalidBody("the body must be a JSON object", kind="type_error")
    if len(data) > SMALL:  # a smaller one cannot have so many
        check_number_of_values(raw, "The body")
    # What is made of it later goes down as deep, with the stack of whoever does it.
    if data.count(b"[") + data.count(b"{") > _DEEPEST and _deeper(raw, _DEEPEST):
        raise InvalidJson(f"The body is nested too deeply: {_DEEPEST} levels are taken.")
    path = _too_large(raw, ("body",)) if _MANY_DIGITS.search(data) else None
    if path is not None:
        raise InvalidBody("the number has more than 64 bits", loc=path)
    passed = Passed(strict=strict)
    if prepare := getattr(kind, "prepare", None):
        prepare(raw, passed)
    sift(raw, kind, passed)
    try:
        body = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error
    return body, passed.said


def _deeper(raw: Any, most: int) -> bool:
    """Whether there are more than `most` levels of lists and objects."""
    level = [raw]
    for _ in range(most):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def check_number_of_values(raw: Any, whose: str) -> None:
    """Raises BodyTooLarge."""
    values = numbers = 0
    rest = [raw]
    while rest:
        one = rest.pop()
        if isinstance(one, int | float):
            numbers += 1
        else:
            values += 1
        if values > MOST_VALUES or numbers > MOST_NUMBERS:
            raise BodyTooLarge(
                f"{whose} has more than {MOST_VALUES} values, or {MOST_NUMBERS} numbers: send "
                "fewer and longer texts, or several requests."
            )
        if isinstance(one, dict):
            rest.extend(one.values())
        elif isinstance(one, list):
            rest.extend(one)


_MANY_DIGITS = re.compile(rb"[0-9]{19}")


def _too_large(value: Any, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
    """Where there is an integer that neither frames nor stored answers can carry."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return next((found for key, one in items if (found := _too_large(one, (*path, key)))), None)


def text_of(content: Content | list[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def texts_or_tokens(given: TextOrTokens, param: str, most: int) -> list[str | list[int]]:
    """As a list of texts, or of lists of tokens, at most so many.  Raises InvalidBody."""
    if isinstance(given, list) and given and all(isinstance(one, int) for one in given):
        given = [cast("list[int]", given)]
    items = [given] if isinstance(given, str) else given
    kinds = {type(one) for one in items}
    if len(kinds) > 1 or int in kinds:
        raise InvalidBody("texts and tokens are mixed", loc=("body", param), kind="type_error")
    if not items or not all(items):
        raise InvalidBody(f"{param} is empty", loc=("body", param))
    if len(items) > most:
        raise InvalidBody(f"{param} has more than {most} entries", loc=("body", param))
    return cast("list[str | list[int]]", items)


def stop_strings(stop: StopStrings | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or [])


def normalise(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the one form that the engine sees and the receipt covers."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {
        "role": message.__struct_config__.tag,
        "content": text_of(message.content),
    }
    if message.name is not None:
        made["name"] = message.name
    if isinstance(message, ToolMessage):
        made["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            made["tool_calls"] = [_call(one) for one in message.tool_calls]
        if message.refusal and not made["content"]:
            made["content"] = message.refusal
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
    return made


def _call(call: ToolCall | CustomToolCall) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        name, arguments = call.function.name, call.function.arguments
    else:
        name, arguments = call.custom.name, as_arguments(call.custom.input)
    function = {"name": name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def check_stream(body: Sampled) -> None:
    """Raises InvalidBody."""
    if body.stream_options is not None and not body.stream:
        raise _needs("stream_options", "stream to be true")


def check_length(body: Sampled, most: int | None) -> None:
    """`most` is the limit of the answer, if it has one.  Raises InvalidBody."""
    if most is not None and (body.min_tokens or 0) > most:
        raise InvalidBody(
            f"min_tokens is {body.min_tokens} and max_tokens {most}: lower the one or raise the "
            "other",
            loc=("body", "min_tokens"),
        )


def max_tokens(body: ChatRequest) -> int | None:
    """The lower of the two limits."""
    limits = (body.max_tokens, body.max_completion_tokens)
    return min((one for one in limits if one is not None), default=None)


def check_chat(body: ChatRequest) -> None:
    """What one field cannot be without another.  Raises InvalidBody."""
    check_stream(body)
    check_length(body, max_tokens(body))
    _check_ending(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise _needs("top_logprobs", "logprobs to be true")
    tools = functions(body.tools or ())
    names = {one.name for one in tools}
    if len(names) < len(tools):
        raise InvalidBody("two tools have the same name", loc=("body", "tools"))
    choice, callable_ = wanted(body.tool_choice)
    if choice not in ("none", "auto") and not (names if callable_ is None else callable_ and names):
        raise _needs("tool_choice", "tools to choose from")
    for name in callable_ or ():
        if name not in names:
            raise InvalidBody(
                f"there is no '{quoted(name)}' among the tools", loc=("body", "tool_choice")
            )
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


def _needs(name: str, what: str) -> InvalidBody:
    return InvalidBody(f"{name} needs {what}", loc=("body", name))


# -- msgspec's validation errors -----------------------------------------------------------------

_LONGEST_SAID = 500  # characters
_AT = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
_PART = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[([0-9]+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `([A-Za-z0-9_]+)`")
_NOT_TAKEN = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
_JSON_OF = {"True": "true", "False": "false", "None": "null"}
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def from_validation(error: msgspec.ValidationError, *, root: str = "body") -> InvalidBody:
    """msgspec says "Expected `str`, got `int` - at `$.messages[0].role`": make `loc` of it."""
    said = _cut(str(error))
    match = _AT.fullmatch(said)
    message, path = (match["message"], match["path"] or "") if match else (said, "")
    loc: list[str | int] = [root]
    for name, index in _PART.findall(path):
        loc.append(name or (index if (place := number(index)) is None else place))
    if missing := _MISSING.fullmatch(message):
        return InvalidBody("field required", loc=(*loc, missing[1]), kind="value_error.missing")
    if unknown := _UNKNOWN.fullmatch(message):
        return InvalidBody(
            f"'{quoted(unknown[1])}' is not a field here: remove it or correct its name",
            loc=(*loc, unknown[1]),
            kind="value_error.extra",
        )
    if taken := _NOT_TAKEN.fullmatch(message):
        value = _JSON_OF.get(taken[1], taken[1])
        return InvalidBody(
            f"{quoted(value)} is not a value that is taken here", loc=tuple(loc), kind="type_error"
        )
    kind = "value_error" if any(mark in message for mark in ("<", ">", "length")) else "type_error"
    return InvalidBody(message[0].lower() + message[1:], loc=tuple(loc), kind=kind)


def _cut(said: str) -> str:
    """Without the middle of what it quotes: the path stands at its end."""
    if len(said) <= 2 * _LONGEST_SAID:
        return said
    return f"{said[:_LONGEST_SAID]}…{said[-_LONGEST_SAID:]}"
