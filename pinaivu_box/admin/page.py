"""One page of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from msgspec import Struct

Stored = TypeVar("Stored")
View = TypeVar("View")


class Page(Struct, Generic[View], frozen=True):
    """`has_more`: there are items after these."""

    data: list[View]
    has_more: bool


def page_of(items: Sequence[Stored], limit: int, view: Callable[[Stored], View]) -> Page[View]:
    """The page with the first `limit` of `items`, which were read with a limit of one more."""
    return Page([view(item) for item in items[:limit]], len(items) > limit)
