"""What the pages for admins share."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.errors import ApiError, StoreError
from pinaivu_box.server.pages import shown
from pinaivu_box.server.pages.render import page

T = TypeVar("T")


def admin_page(request: Request, template: str, **context: Any) -> HTMLResponse:
    """A page; its template also has the functions in `shown`."""
    return page(request, f"admin/{template}", **shown.FUNCTIONS, **context)


async def filtered(listing: Awaitable[T]) -> tuple[T | None, str]:
    """A list, or why there is none for its filters: a name that they hold is not known, or what
    should be a date is none."""
    try:
        return await listing, ""
    except (ApiError, StoreError) as error:
        return None, error.message
