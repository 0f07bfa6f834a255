"""Fields of a body that have no meaning here: passed over, and said, at any depth.

A body is walked beside its wire type.  A name that the type does not know is taken out and noted;
one that is nearly a known name is refused, since it is a mistake that would change the answer.
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

LONGEST_NAME = 100  # characters of a field's name that are looked at, and said again
MOST_SAID = 64  # names in an answer
_NEAR = 0.85  # how much of two names must be the same, as difflib counts
BILLING = "x-anthropic-billing-header"  # stands in Claude Code's system prompt
# Names that programs send and that nothing here stands behind.  They are no misspelling of any.
KNOWN = frozenset({
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


class Passed:
    """What was passed over in one body.  With `strict` it is refused instead."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._said: dict[str, None] = {}
        self._more = 0

    def over(self, *path: str | int) -> None:
        """Note what stands at that path of the body.  Raises UnsupportedParameter if it is strict,
        InvalidBody if it is also no name that is known."""
        name = path[-1]
        if self._strict and name in KNOWN:
            raise UnsupportedParameter(
                f"'{quoted(str(name))}' has no meaning here: remove it",
                loc=("body", *path),
                kind="value_error.unsupported",
            )
        if self._strict:
            raise _unknown(("body", *path), "")
        said = ".".join(str(part)[: LONGEST_NAME + 1] for part in path if isinstance(part, str))
        said = quoted(said, LONGEST_NAME)
        if len(self._said) < MOST_SAID or said in self._said:
            self._said[said] = None
        else:
            self._more += 1

    @property
    def full(self) -> bool:
        return len(self._said) >= MOST_SAID

    @property
    def said(self) -> list[str]:
        """The names, with a dot between the levels."""
        return [*self._said, *([f"… and {self._more} more"] if self._more else [])]


def sift(
    raw: dict[str, Any], kind: type[msgspec.Struct], passed: Passed, path: Location = ()
) -> None:
    """Take out of `raw`, which stands at that path of the body, what `kind` does not know, and make
    integers of integral floats where integers are wanted.  Raises what `Passed.over` does, and
    InvalidBody for a name that is nearly a known one."""
    _sift(raw, _shape_of(kind), path, passed)


@dataclass
class _Shape:
    """What may stand at a place: an object with these `fields`, or one of several that a field
    tells apart; a list of `item`; an object with `values` of any name; an integer."""

    fields: dict[str, _Shape | None] | None = None
    tag: str = ""
    tagged: dict[Any, _Shape] = field(default_factory=dict)
    item: _Shape | None = None
    values: _Shape | None = None
    integral: bool = False

    @property
    def anything(self) -> bool:
        return not (self.fields is not None or self.tagged or self.item or self.values) and (
            not self.integral
        )


def _sift(value: Any, shape: _Shape, path: Location, passed: Passed) -> Any:
    """What is to stand there instead."""
    if isinstance(value, dict):
        _sift_object(value, shape, path, passed)
    elif isinstance(value, list) and shape.item is not None:
        _sift_list(value, shape.item, path, passed)
    elif isinstance(value, float) and shape.integral and value.is_integer():
        return int(value)
    return value


def _sift_list(values: list[Any], item: _Shape, path: Location, passed: Passed) -> None:
    for place, one in enumerate(values):
        if isinstance(one, dict | list | float):
            values[place] = _sift(one, item, (*path, place), passed)


def _sift_object(raw: dict[str, Any], shape: _Shape, path: Location, passed: Passed) -> None:
    if shape.tagged:
        tag = raw.get(shape.tag)
        found = shape.tagged.get(tag) if isinstance(tag, str) else None
        if found is None:
            return  # the type says what is wrong
        shape = found
    if shape.fields is None:
        if shape.values is not None:
            for name, one in raw.items():
                raw[name] = _sift(one, shape.values, (*path, name), passed)
        return
    for name in [name for name in raw if name not in shape.fields]:
        pass_over(raw, name, path, frozenset(shape.fields), passed)
    for name, one in raw.items():
        inner = shape.fields[name]
        if inner is not None and isinstance(one, dict | list | float):
            raw[name] = _sift(one, inner, (*path, name), passed)


def pass_over(
    raw: dict[str, Any], name: str, path: Location, known: frozenset[str], passed: Passed
) -> None:
    """Take an unknown name out.  Raises InvalidBody if it is nearly one that is known."""
    # Once so many were said, a body consists of nothing else: no more are compared.
    if name not in KNOWN and not passed.full and (near := _near(name[:LONGEST_NAME], known)):
        raise _unknown(("body", *path, name), near)
    passed.over(*path, name)
    del raw[name]


def _near(name: str, known: frozenset[str]) -> str:
    letters = _letters(name)  # the same ones in another order are two that changed places
    if same := next((one for one in sorted(known) if _letters(one) == letters), ""):
        return same
    return next(iter(difflib.get_close_matches(name, known, 1, _NEAR)), "")


@lru_cache(1024)
def _letters(name: str) -> list[str]:
    return sorted(name.replace("_", "").replace("-", "").lower())


def _unknown(loc: Location, near: str) -> InvalidBody:
    hint = f"did you mean '{near}'?" if near else "remove it or correct its name"
    return InvalidBody(
        f"'{quoted(str(loc[-1]))}' is not a field here: {hint}", loc=loc, kind="value_error.extra"
    )


# -- shapes, made of the wire types once ---------------------------------------------------------


@cache
def _shape_of(kind: type[msgspec.Struct]) -> _Shape:
    return _shape(inspect.type_info(kind)) or _Shape(fields={})


def _shape(info: inspect.Type) -> _Shape | None:
    """None where nothing is to be looked at."""
    match info:
        case inspect.Metadata():
            return _shape(info.type)
        case inspect.StructType():
            shape = _Shape(fields={one.encode_name: _shape(one.type) for one in info.fields})
            if info.tag_field is not None:
                assert shape.fields is not None
                shape.fields[info.tag_field] = None
            return shape
        case inspect.ListType():
            item = _shape(info.item_type)
            return None if item is None else _Shape(item=item)
        case inspect.DictType():
            values = _shape(info.value_type)
            return None if values is None else _Shape(values=values)
        case inspect.IntType():
            return _Shape(integral=True)
        case inspect.UnionType():
            return _union(info)
    return None


def _union(info: inspect.UnionType) -> _Shape | None:
    made = _Shape()
    for one in info.types:
        shape = _shape(one)
        if shape is None:
            continue
        if isinstance(one, inspect.StructType) and one.tag_field is not None:
            made.tag = one.tag_field
            made.tagged[one.tag] = shape
        elif shape.fields is not None:
            made.fields = shape.fields
        made.item = made.item or shape.item
        made.values = made.values or shape.values
        made.integral = made.integral or shape.integral
    if any(isinstance(one, inspect.FloatType) for one in info.types):
        made.integral = False
    return None if made.anything else made
