"""JSON on which no two readers differ."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str) -> Any:
    """Readers of JSON must not differ on what a signed text says: no name of an object may be there
    twice, nothing may stand before or after the value, and NaN is no number.  Raises ValueError,
    RecursionError."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the field `{name[:100]}` is there twice")
        members[name] = value
    return members


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")
