"""Errors as HTTP answers: OpenAI's `error` object and FastAPI's `detail`, always both."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.errors import (
    ApiError,
    BadRequest,
    ContextOverflow,
    InternalError,
    InvalidBody,
    MethodNotAllowed,
    NoNodesAvailable,
    NotFound,
)
from pinaivu_box.server.codings import CODINGS
from pinaivu_box.server.routes import methods_at, nothing_at

log = logging.getLogger("pinaivu.http")


class JSON(Response):
    """A JSON response of anything that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


ANTHROPIC = "/v1/messages"
_OVERFLOW = "This model's maximum context length is"
_NUMBER = re.compile(r"[0-9]+")
_ABOUT_OPERATORS = (402, 403, 429, 503)
# What Anthropic's clients know our errors by, by status.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def body(error: ApiError, path: str = "") -> dict[str, Any]:
    detail: Any = error.message
    if isinstance(error, InvalidBody):
        detail = [{"loc": list(error.loc), "msg": error.message, "type": error.kind}]
    made: dict[str, Any] = {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
        "detail": detail,
    }
    if path.startswith(ANTHROPIC):
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        made["type"] = "error"
        made["error"]["type"] = _ANTHROPIC_TYPES.get(error.status, kind)
    return made


def told(error: ApiError, contact: str, path: str) -> ApiError:
    """The error as it is said at that path: with whom to ask about it where the operator decides
    whether it passes, and an overflow in the words by which that API's clients know that they have
    to shorten a conversation."""
    message = error.message
    if isinstance(error, ContextOverflow):
        message = _too_long(message, path)
    elif contact and error.status in _ABOUT_OPERATORS:
        message = f"{message} Contact: {contact}"
    if message == error.message:
        return error
    made = copy.copy(error)
    made.message = message
    return made


def _too_long(message: str, path: str) -> str:
    """`message` is `ContextOverflow`'s; a peer may say it in other words, with the same numbers."""
    counts = [count for one in _NUMBER.findall(message) if (count := int(one))]
    tokens, most = (max(counts), min(counts)) if len(counts) > 1 else (0, 0)
    if path.startswith(ANTHROPIC):
        said = f"{tokens} tokens > {most} maximum" if tokens else message
        return f"prompt is too long: {said}"
    if message.startswith(_OVERFLOW):
        return message
    other = f"{_OVERFLOW} exceeded: {message} ({ContextOverflow.code})"
    return ContextOverflow.of(tokens, most).message if tokens else other


def note(request: Request, error: ApiError) -> None:
    """Count an error that somebody with a key has got, also as one of the key's requests; not one
    that the operator has ordered."""
    state = request.scope["state"]
    if arrival := state.get("arrival"):
        arrival.refused(error)
    if (key := state.get("key")) and not error.ordered:
        request.app.state.box.refusals.note(key.id, state.get("model", ""), error.code)


def response(error: ApiError, path: str = "") -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 415:
        headers["Accept-Encoding"] = ", ".join(CODINGS)
    return JSON(body(error, path), status_code=error.status, headers=headers)


async def on_api_error(request: Request, error: Exception) -> Response:
    shown = error if isinstance(error, ApiError) else InternalError(str(error))
    note(request, shown)
    contact = request.app.state.box.config.server.contact
    path = request.url.path
    return response(told(shown, contact, path), path)


async def on_database_error(request: Request, error: Exception) -> Response:
    """The disk has filled since somebody looked, or the database is in use for too long."""
    log.exception("the database failed", exc_info=error)
    why = f"This box cannot read or write its database now: {error}.  Try again later."
    return await on_api_error(request, NoNodesAvailable(why, retry_after=5))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path, method = _shortened(request.url.path), request.method
    routes = request.app.routes
    if status == 404:
        hint = nothing_at(path, routes)
        return response(NotFound(f"There is no {path} here. {hint}"), request.url.path)
    if status == 405:
        allowed = methods_at(request.url.path, routes)
        message = f"{path} does not take {method}: it takes {', '.join(allowed)}."
        refusal = response(MethodNotAllowed(message), request.url.path)
        refusal.headers["Allow"] = ", ".join(allowed)
        return refusal
    return response(BadRequest(f"{method} {path} could not be understood."))


def _shortened(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:100]}…"
