"""Unknown fields of a body, at any depth: they are ignored, and reported in the answer.

A body is walked beside its wire type.  A name that the type does not know is removed and noted; one
that resembles a known name is refused, because it is a mistake that would change the answer.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import msgspec
from msgspec import inspect

from pinaivu_box.errors import InvalidBody, UnsupportedParameter, quoted

Location = tuple[str | int, ...]

MAX_NAME_CHARACTERS = 100  # of a field's name that are compared and reported
MAX_NAMES = 64  # reported in an answer
_MIN_SIMILARITY = 0.85  # of two names, as difflib measures it
BILLING = "x-anthropic-billing-header"  # begins a line of Claude Code's system prompt
# Names that clients send and that have no meaning here; they are not misspellings of others.
FOREIGN_NAMES = frozenset({
    BILLING, "anthropic_beta", "betas", "best_of", "cache_control", "caching", "client_metadata",
    "container", "context_management", "conversation_id", "custom_id", "debug", "extra_body",
    "guided_decoding_backend", "guided_whitespace_pattern", "id", "inference_geo", "input_type",
    "litellm_metadata", "max_tool_calls", "mcp_servers", "metadata", "min_tokens", "models",
    "moderation", "num_ctx", "options", "output_config", "plugins", "prompt_cache_options",
    "prompt_cache_retention", "provider", "provider_specific_fields", "reasoning",
    "reasoning_details", "request_id", "route", "session_id", "speed", "status", "store", "tags",
    "thinking_budget", "top_a", "top_n", "transforms", "truncation", "type", "user_id",
    "verbosity", "web_search_options",
})  # fmt: skip


class IgnoredFields:
    """The ignored fields of one body.  With `strict` they are refused instead."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._names: dict[str, None] = {}
        self._unnamed = 0

    def add(self, *path: str | int) -> None:
        """Note the field at that path of the body.  If strict, raises UnsupportedParameter, or
        InvalidBody for a name that no client is known to send."""
        name = path[-1]
        if self._strict and name in FOREIGN_NAMES:
            raise UnsupportedParameter(
                f"'{quoted(str(name))}' has no meaning here: remove it",
                loc=("body", *path),
                kind="value_error.unsupported",
            )
        if self._strict:
            raise unknown_field(("body", *path))
        parts = [str(part)[: MAX_NAME_CHARACTERS + 1] for part in path if isinstance(part, str)]
        dotted = quoted(".".join(parts), MAX_NAME_CHARACTERS)
        if len(self._names) < MAX_NAMES or dotted in self._names:
            self._names[dotted] = None
        else:
            self._unnamed += 1

    @property
    def full(self) -> bool:
        return len(self._names) >= MAX_NAMES

    @property
    def names(self) -> list[str]:
        """With a dot between the levels."""
        return [*self._names, *([f"… and {self._unnamed} more"] if self._unnamed else [])]


def drop_unknown(
    raw: dict[str, Any], kind: type[msgspec.Struct], ignored: IgnoredFields, path: Location = ()
) -> None:
    """Remove from `raw`, at that path of the body, the fields that `kind` does not know.

    Also makes integers of integral floats where integers are expected.  Raises what
    `IgnoredFields.add` does, and InvalidBody for a name that resembles a known one.
    """
    _drop(raw, _shape_of(kind), path, ignored)


# The fields of an object, and what is expected in each.
_Fields = dict[str, "_Shape | None"]


@dataclass
class _Shape:
    """What is expected at a place of the body, as far as it is looked at: `objects` with known
    fields, by the value of the field `tag` (None where there is none); a list of `item`; an object
    with `values` of any name; an integer."""

    objects: dict[Any, _Fields] = field(default_factory=dict)
    tag: str | None = None
    item: _Shape | None = None
    values: _Shape | None = None
    integral: bool = False


def _drop(value: Any, shape: _Shape, path: Location, ignored: IgnoredFields) -> Any:
    """Returns the value that replaces `value`."""
    if isinstance(value, dict):
        _drop_in_object(value, shape, path, ignored)
    elif isinstance(value, list) and shape.item is not None:
        for index, item in enumerate(value):
            if isinstance(item, dict | list | float):
                value[index] = _drop(item, shape.item, (*path, index), ignored)
    elif isinstance(value, float) and shape.integral and value.is_integer():
        return int(value)
    return value


def _drop_in_object(
    raw: dict[str, Any], shape: _Shape, path: Location, ignored: IgnoredFields
) -> None:
    tag = None if shape.tag is None else raw.get(shape.tag, "")
    fields = shape.objects.get(tag) if isinstance(tag, str | None) else None
    if fields is None:  # of an unknown tag: applying the type will say what is wrong
        fields = dict.fromkeys(raw, shape.values)
    for name in [name for name in raw if name not in fields]:
        _drop_field(raw, name, path, frozenset(fields), ignored)
    for name, value in raw.items():
        inner = fields[name]
        if inner is not None and isinstance(value, dict | list | float):
            raw[name] = _drop(value, inner, (*path, name), ignored)


def _drop_field(
    raw: dict[str, Any], name: str, path: Location, known: frozenset[str], ignored: IgnoredFields
) -> None:
    """Remove an unknown field.  Raises InvalidBody if its name resembles a known one."""
    # After so many unknown fields misspellings are not the cause: no more names are compared.
    compared = name not in FOREIGN_NAMES and not ignored.full
    if compared and (similar := _similar(name[:MAX_NAME_CHARACTERS], known)):
        raise unknown_field(("body", *path, name), similar)
    ignored.add(*path, name)
    del raw[name]


def _similar(name: str, known: frozenset[str]) -> str:
    letters = _letters(name)  # equal if letters were swapped
    if anagram := next((other for other in sorted(known) if _letters(other) == letters), ""):
        return anagram
    return next(iter(difflib.get_close_matches(name, known, 1, _MIN_SIMILARITY)), "")


@lru_cache(1024)
def _letters(name: str) -> list[str]:
    return sorted(name.replace("_", "").replace("-", "").lower())


def unknown_field(loc: Location, similar: str = "") -> InvalidBody:
    hint = f"did you mean '{similar}'?" if similar else "remove it or correct its name"
    return InvalidBody(
        f"'{quoted(str(loc[-1]))}' is not a field here: {hint}", loc=loc, kind="value_error.extra"
    )


# -- shapes, made from the wire types once -------------------------------------------------------


@cache
def _shape_of(kind: type[msgspec.Struct]) -> _Shape:
    return _shape(inspect.type_info(kind)) or _Shape()


def _shape(info: inspect.Type) -> _Shape | None:
    """None where nothing is looked at."""
    match info:
        case inspect.Metadata():
            return _shape(info.type)
        case inspect.StructType():
            fields = {field.encode_name: _shape(field.type) for field in info.fields}
            if info.tag_field is not None:
                fields[info.tag_field] = None
            return _Shape({None: fields})
        case inspect.ListType():
            item = _shape(info.item_type)
            return item and _Shape(item=item)
        case inspect.DictType():
            values = _shape(info.value_type)
            return values and _Shape(values=values)
        case inspect.IntType():
            return _Shape(integral=True)
        case inspect.UnionType():
            return _union(info)
    return None


def _union(info: inspect.UnionType) -> _Shape | None:
    union = _Shape()
    for member in info.types:
        shape = _shape(member)
        if shape is None:
            continue
        if isinstance(member, inspect.StructType) and member.tag_field is not None:
            union.tag = member.tag_field
            union.objects[member.tag] = shape.objects[None]
        else:
            union.objects |= shape.objects
        union.item = union.item or shape.item
        union.values = union.values or shape.values
        union.integral = union.integral or shape.integral
    if any(isinstance(member, inspect.FloatType) for member in info.types):
        union.integral = False
    return None if union == _Shape() else union
