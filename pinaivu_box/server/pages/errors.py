"""Errors of a browser that opens a page: a page too, where programs get JSON."""

from __future__ import annotations

import logging
import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from pinaivu_box.errors import ApiError, InternalError, SessionEnded
from pinaivu_box.server import error_responses
from pinaivu_box.server.context import box_of, request_id_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.text import END

log = logging.getLogger("pinaivu.pages")

_NO_PAGES = re.compile(rf"/(?:v1|api|static|health|readyz|metrics|openapi\.json)(?:/|{END})")
_KEPT_HEADERS = ("retry-after", "allow")
_TITLES = {
    400: "This address cannot be understood",
    401: "You are not logged in",
    402: "The budget is spent",
    403: "This page is not for you",
    404: "There is no such page",
    405: "This cannot be done here",
    422: "This address has a value that is not valid",
    429: "Too many requests",
    503: "This is not available now",
}


def wants_page(request: Request) -> bool:
    """A browser names HTML when it opens an address; scripts and programs do not."""
    opens = request.method in ("GET", "HEAD") and not _NO_PAGES.match(request.url.path)
    return opens and "text/html" in request.headers.get("accept", "").lower()


async def on_error(request: Request, error: Exception) -> Response:
    response = await error_responses.on_error(request, error)
    api_error = error if isinstance(error, ApiError) else error_responses.of_store(error)
    return _for_browser(request, response, api_error.message)


def on_refusal(scope: Scope, error: ApiError) -> Response:
    """The answer to a request that was refused before any endpoint had it; who has to log in again
    is led there."""
    request, path = Request(scope), scope["path"]
    if isinstance(error, SessionEnded) and wants_page(request):
        return error_responses.to_login(request)
    adapted = error_responses.adapted(error, box_of(request).config.server.contact, path)
    return _for_browser(request, error_responses.response(adapted, path), error.message)


async def on_database_error(request: Request, error: Exception) -> Response:
    response = await error_responses.on_database_error(request, error)
    return _for_browser(request, response, "The box cannot read or write its database now.")


async def on_http_error(request: Request, error: Exception) -> Response:
    response = await error_responses.on_http_error(request, error)
    unknown = isinstance(error, HTTPException) and error.status_code == 404
    message = "The address may be mistyped, or the page has moved." if unknown else str(error)
    return _for_browser(request, response, message)


def on_failure(scope: Scope) -> Response:
    """The answer to a request on which the box failed in a way that nobody has foreseen."""
    error = InternalError("The box failed on this request; its log says why.")
    response, request = error_responses.response(error), Request(scope)
    try:
        return _for_browser(request, response, error.message)
    except Exception:  # the frame of all pages may be what failed
        log.exception("the page of an error failed")
        return response


def _for_browser(request: Request, response: Response, message: str) -> Response:
    status = response.status_code
    if status < 400 or not wants_page(request):  # below, it leads to the login
        return response
    contact = box_of(request).config.server.contact
    if contact and status in (402, 403, 429, 503):
        message = f"{message} Contact: {contact}"
    title = _TITLES.get(status, "The box failed on this request" if status >= 500 else "Error")
    shown = page(
        request,
        "error.html",
        status=status,
        error_status=status,
        title=title,
        message=message,
        request_id=request_id_of(request),
    )
    for name in _KEPT_HEADERS:
        if name in response.headers:
            shown.headers[name] = response.headers[name]
    return shown
