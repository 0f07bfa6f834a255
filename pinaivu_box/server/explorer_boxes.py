"""A box as the explorer names it."""

from __future__ import annotations

from msgspec import Struct


class NamedBox(Struct, frozen=True):
    """`name` is empty where it is not known, or not to this visitor."""

    id: str
    name: str
