"""Bounds numbers in JSON schemas, so that they end.

A small model goes on with digits until its tokens are used up, and what is cut off there does not
parse.  llama.cpp's converter (`json-schema-to-grammar.cpp`) has limits for the same reason: sixteen
digits before the point and sixteen behind it.
"""

from __future__ import annotations

from typing import Any

_VALUES = ("const", "enum", "default", "examples")  # keywords that hold no schemas
_MAX_BOUND, _MIN_RANGE = 1e6, 1e-3  # nine decimals lose nothing between such
_MAX_INTEGER = 2**53 - 1  # what every JSON parser reads exactly (RFC 8259, section 6)


def with_an_end(schema: Any) -> Any:
    """The same schema, but an integer without a bound has one of 2^53 - 1, and a number between two
    bounds has nine decimals at most.  A number without bounds may need its exponent: it is left."""
    if isinstance(schema, list):
        return [with_an_end(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {
        name: inner if name in _VALUES else with_an_end(inner) for name, inner in schema.items()
    }
    low = _bound(schema, "minimum", "exclusiveMinimum")
    high = _bound(schema, "maximum", "exclusiveMaximum")
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "integer" in kinds and "number" not in kinds:
        if low is None and (high is None or high > -_MAX_INTEGER):
            bounded["minimum"] = -_MAX_INTEGER
        if high is None and (low is None or low < _MAX_INTEGER):
            bounded["maximum"] = _MAX_INTEGER
    if "number" in kinds and low is not None and high is not None and _fits_nine(low, high):
        bounded.setdefault("multipleOf", 1e-9)
    return bounded


def _bound(schema: dict[str, Any], *names: str) -> float | None:
    return next((schema[name] for name in names if type(schema.get(name)) in (int, float)), None)


def _fits_nine(low: float, high: float) -> bool:
    return -_MAX_BOUND <= low < high <= _MAX_BOUND and high - low >= _MIN_RANGE
