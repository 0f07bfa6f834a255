"""Lists: as they are answered, and read page by page."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class ListAnswer(Struct, frozen=True, kw_only=True):
    """Base of answers with `data`."""

    object: str = "list"
    request_id: str = ""


class PageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`after`: the id (of an account, the name) of the last entry of the page before."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: str | None = None
