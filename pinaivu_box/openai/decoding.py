"""Decodes bodies: JSON to the wire type of an endpoint, within limits."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from pinaivu_box.errors import BodyTooLarge, InvalidBody, InvalidJson, quoted
from pinaivu_box.openai.fields import IgnoredFields, drop_unknown, unknown_field
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


# -- msgspec's validation errors -----------------------------------------------------------------

_MAX_MESSAGE_CHARACTERS = 500  # of each end
_AT = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
_PART = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[([0-9]+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `([A-Za-z0-9_]+)`")
_INVALID_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
_JSON_OF = {"True": "true", "False": "false", "None": "null"}
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def from_validation(error: msgspec.ValidationError, *root: str) -> InvalidBody:
    """As InvalidBody, with the path in msgspec's message ("Expected `str`, got `int` - at
    `$.messages[0].role`") as its `loc`, below `root` (the body, if there is none)."""
    text = _shortened(str(error))
    match = _AT.fullmatch(text)
    message, path = (match["message"], match["path"] or "") if match else (text, "")
    loc: list[str | int] = [*(root or ("body",))]
    for name, index in _PART.findall(path):
        loc.append(name or (index if (position := number(index)) is None else position))
    if missing := _MISSING.fullmatch(message):
        return InvalidBody("field required", loc=(*loc, missing[1]), kind="value_error.missing")
    if unknown := _UNKNOWN.fullmatch(message):
        return unknown_field((*loc, unknown[1]))
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
