"""JSON schemas at random, of what applications ask for: objects, arrays, unions, bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
PATTERNS = ["[a-z]{2,6}", "[A-Z][a-z]{1,5}( [A-Z][a-z]{1,5})?", "\\d{4}-\\d{2}", "#[0-9a-f]{6}"]
WORDS = ["name", "age", "city", "tags", "size", "kind", "id", "note", "total", "items"]


def make_schema(seed: int) -> Schema:
    """Always an object.  Strings and arrays are bounded, so that a small model comes to an end."""
    draw = random.Random(seed)
    made = _object(draw, 3)
    if draw.random() < 0.4:
        made["$defs"] = {"part": _object(draw, 1)}
        name = f"ref_{draw.choice(WORDS)}"
        made["properties"][name] = {"$ref": "#/$defs/part"}
        made["required"].append(name)
    return made


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(WORDS, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.random() < 0.8],
        "additionalProperties": False,
    }


def _any(draw: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [
        _string,
        _integer,
        _number,
        _enum,
        _constant,
        _simple,
    ]
    if depth > 0:
        kinds += [_object_in, _array, _union]
    return draw.choice(kinds)(draw, depth)


def _object_in(draw: random.Random, depth: int) -> Schema:
    return _object(draw, depth)


def _string(draw: random.Random, _depth: int) -> Schema:
    kind = draw.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": f"^{draw.choice(PATTERNS)}$"}
    if kind == 1:
        return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(1, 20)}


def _integer(draw: random.Random, _depth: int) -> Schema:
    least = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 5000)}


def _number(draw: random.Random, _depth: int) -> Schema:
    least = round(draw.uniform(-10, 10), 2)
    most = round(least + draw.uniform(0.5, 100), 2)
    bounds = draw.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    return {"type": "number", bounds[0]: least, bounds[1]: most}


def _enum(draw: random.Random, _depth: int) -> Schema:
    return {"enum": draw.sample(["red", "green", 3, None, True, 'a "quoted" one', "ß"], 3)}


def _constant(draw: random.Random, _depth: int) -> Schema:
    return {"const": draw.choice(["v1", 7, False])}


def _simple(draw: random.Random, _depth: int) -> Schema:
    return {"type": draw.choice(["boolean", "null"])}


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _any(draw, depth - 1),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _union(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(draw, depth - 1) for _ in range(draw.randint(2, 3))]}
