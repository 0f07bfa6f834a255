"""The body of a chat request: decoded, checked, and brought into one form."""

from __future__ import annotations

import re

import msgspec

from pinaivu_box.errors import InvalidBody, InvalidJson, UnsupportedParameter
from pinaivu_box.openai.parameters import unsupported
from pinaivu_box.openai.types import ChatRequest, Message


def decode(data: bytes) -> ChatRequest:
    """Raises InvalidJson, InvalidBody, UnsupportedParameter."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidJson("The body is nested too deeply.") from error
    if not isinstance(raw, dict):
        raise InvalidBody("the body must be a JSON object", kind="type_error")
    for name, reason in unsupported(raw):
        raise UnsupportedParameter(reason, loc=("body", name), kind="value_error.unsupported")
    try:
        body = msgspec.convert(raw, ChatRequest)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error
    if body.stream_options is not None and not body.stream:
        raise InvalidBody("stream_options needs stream to be true", loc=("body", "stream_options"))
    return body


def normalise(body: ChatRequest) -> tuple[list[dict[str, object]], list[str]]:
    """Messages and stop strings in the one form that the engine sees and the receipt covers."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [_message(message) for message in body.messages], list(stop)


def _message(message: Message) -> dict[str, object]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    made: dict[str, object] = {"role": message.role, "content": text}
    if message.name is not None:
        made["name"] = message.name
    return made


# -- msgspec's validation errors -----------------------------------------------------------------

_AT = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_PART = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")


def from_validation(error: msgspec.ValidationError, *, root: str = "body") -> InvalidBody:
    """msgspec says "Expected `str`, got `int` - at `$.messages[0].role`": make `loc` of it."""
    match = _AT.match(str(error))
    message, path = (match["message"], match["path"] or "") if match else (str(error), "")
    loc: list[str | int] = [root]
    for name, index in _PART.findall(path):
        loc.append(name or (int(index) if index.isdigit() else index))
    if missing := _MISSING.fullmatch(message):
        return InvalidBody("field required", loc=(*loc, missing[1]), kind="value_error.missing")
    if unknown := _UNKNOWN.fullmatch(message):
        return InvalidBody(
            f"'{unknown[1]}' is not a field here: remove it or correct its name",
            loc=(*loc, unknown[1]),
            kind="value_error.extra",
        )
    kind = "value_error" if any(mark in message for mark in ("<", ">", "length")) else "type_error"
    return InvalidBody(message[0].lower() + message[1:], loc=tuple(loc), kind=kind)
