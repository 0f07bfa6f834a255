"""How long those texts of a request may be that are programs of a kind: schemas, grammars, stop
strings.  Looked at before anything is done with them, of our own clients and of peers alike.

The tools of coding agents have up to 100 kB, grammars that people write some ten.
"""

from __future__ import annotations

from pinaivu_box.engine.messages import Constraint, Tools
from pinaivu_box.errors import InvalidBody

MAX_GRAMMAR = 64 * 1024  # all in characters
MAX_SCHEMA = 256 * 1024
MAX_TOOLS = 512 * 1024
MAX_FUNCTIONS = 1024
MAX_STOP = 1024


def check_sizes(tools: Tools | None, constraint: Constraint | None, stop: list[str]) -> None:
    """Raises InvalidBody."""
    if constraint is not None and constraint.kind == "json_schema":
        _check(len(constraint.text), MAX_SCHEMA, "the JSON schema", "response_format")
    elif constraint is not None:
        _check(len(constraint.text), MAX_GRAMMAR, "the grammar", "grammar")
    if tools is not None:
        check_tools(len(tools.functions))
        if len(tools.names) > MAX_FUNCTIONS:
            raise InvalidBody(f"there are more than {MAX_FUNCTIONS} tools", loc=("body", "tools"))
    for text in stop:
        _check(len(text), MAX_STOP, "a stop string", "stop")


def check_tools(size: int) -> None:
    """Of the JSON text of a request's tools, also those that may not be called.  Raises
    InvalidBody."""
    _check(size, MAX_TOOLS, "the JSON text of the tools", "tools")


def _check(size: int, max_chars: int, subject: str, param: str) -> None:
    if size > max_chars:
        why = f"{subject} has {size} characters, and {max_chars} are the most: make it smaller"
        raise InvalidBody(why, loc=("body", param))
