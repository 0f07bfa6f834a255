"""The limits of a peer as options of `peers edit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pinaivu_box.errors import UsageError

NONE = "none"  # what puts a setting back to what [peering] says
_LIMITS = (
    ("--max-parallel", "max_parallel", "N", "Requests of it at a time."),
    ("--tokens-per-minute", "tokens_per_minute", "N", "Tokens for it in any minute; 0: endless."),
    ("--credit-limit", "credit_limit", "AMOUNT", "What it may owe us."),
    ("--hours", "hours", "TIMES", 'When it is served, for example "18:00-08:00".'),
)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """They arrive as one keyword argument each, under the name of the setting."""
    for option, name, metavar, text in reversed(_LIMITS):
        command = click.option(option, name, metavar=metavar, help=text)(command)
    return click.option(
        "--model", "models", multiple=True, metavar="GLOB", help="What it may use.  Repeatable."
    )(command)


def limits_of(given: dict[str, Any]) -> dict[str, Any]:
    """As the API takes them: what was given, null for 'none'.  Raises UsageError."""
    return {name: _json(name, value) for name, value in given.items() if value not in (None, ())}


def _json(name: str, value: Any) -> Any:
    if value in (NONE, (NONE,)):
        return None
    if name in ("max_parallel", "tokens_per_minute"):
        try:
            return int(value)
        except ValueError:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option}: '{value}' is no number.") from None
    return list(value) if isinstance(value, tuple) else value
