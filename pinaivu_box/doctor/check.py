"""The result of one check."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["ok", "warning", "failed"]


class Check(Struct, frozen=True):
    """`found` is a clause, `todo` what the operator can do (empty if there is nothing to do)."""

    name: str
    state: State
    found: str
    todo: str = ""


def of_error(name: str, message: str) -> Check:
    """A failed check; `message` says what is wrong and, after a colon, what to do."""
    finding, _, todo = message.removesuffix(".").rpartition(": ")
    return Check(name, "failed", finding, todo) if finding else Check(name, "failed", todo)
