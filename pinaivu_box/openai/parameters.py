"""Parameters of OpenAI's API that this box does not serve yet: refused by name, never ignored.

A value that asks for nothing (`n: 1`, `tools: []`, null) is what is served anyway, and passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Name -> the values that change nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


def unsupported(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, why) of each parameter that asks for what is not served; removes the others."""
    for name, neutral in NOT_SERVED.items():
        value = body.pop(name, None)
        if value is not None and not any(_same(value, passing) for passing in neutral):
            yield name, f"'{name}' is part of OpenAI's API but not served by this box yet"


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return value == other and isinstance(value, bool) == isinstance(other, bool)
