"""Parameters of OpenAI's API that this box does not serve: refused by name, never ignored.

A value that asks for nothing (`functions: []`, null) is what is served anyway, and passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Name -> the values that change nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_cache_retention": ("in_memory",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def unsupported(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, why) of each parameter that asks for what is not served; removes the others."""
    for name, neutral in NOT_SERVED.items():
        value = body.get(name)
        if value is None or any(_same(value, passing) for passing in neutral):
            body.pop(name, None)
        else:
            yield name, f"'{name}' is part of OpenAI's API but not served by this box"


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return value == other and isinstance(value, bool) == isinstance(other, bool)
