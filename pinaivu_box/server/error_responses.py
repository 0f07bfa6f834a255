"""Errors as HTTP answers, with OpenAI's `error` object and FastAPI's `detail`."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pinaivu_box.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    Conflict,
    ContextOverflow,
    ConversationTooLong,
    InternalError,
    InvalidBody,
    InvalidValue,
    LoginNeeded,
    MethodNotAllowed,
    NoNodesAvailable,
    NotFound,
    RateLimited,
    ResponseNotCompleted,
    RowConflict,
    RowNotFound,
    quoted,
)
from pinaivu_box.gateway.quota import Entry
from pinaivu_box.server.codings import CODINGS
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.paths import forwarded_prefix, methods_at, suggestion

log = logging.getLogger("pinaivu.http")

ANTHROPIC = "/v1/messages"
OLLAMA = "/api/"
_NOT_OLLAMA = "/api/v1/"  # OpenAI's clients with a wrong base URL
_OVERFLOW = "This model's maximum context length is"
_NUMBER = re.compile(r"[0-9]+")
_STATUSES_WITH_CONTACT = (402, 403, 429, 503)  # the operator decides about these
# The error types of Anthropic's API by status.
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
    content: dict[str, Any] = {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
        "detail": detail,
    }
    if path.startswith(OLLAMA) and not path.startswith(_NOT_OLLAMA):
        return {**content, "error": error.message, "code": error.code}
    if path.startswith(ANTHROPIC):
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        content["type"] = "error"
        content["error"]["type"] = _ANTHROPIC_TYPES.get(error.status, kind)
    return content


def event(error: ApiError) -> dict[str, Any]:
    """The data of an event that ends a stream of OpenAI's; SDKs raise it."""
    fields = {"message": error.message, "type": error.type, "param": None, "code": error.code}
    return {"error": fields}


def adapted(error: ApiError, contact: str, path: str) -> ApiError:
    """The error as it is worded at that path: with the contact where the operator decides about
    it, and an overflow in the words by which that API's clients recognise that they have to
    shorten a conversation."""
    message = error.message
    if isinstance(error, ContextOverflow):
        message = _too_long(message, path)
    elif contact and error.status in _STATUSES_WITH_CONTACT:
        message = f"{message} Contact: {contact}"
    if message == error.message:
        return error
    copied = copy.copy(error)
    copied.message = message
    return copied


def _too_long(message: str, path: str) -> str:
    """`message` is `ContextOverflow`'s; a peer may word it otherwise, with the same numbers."""
    counts = [count for digits in _NUMBER.findall(message) if (count := int(digits))]
    tokens, context = (max(counts), min(counts)) if len(counts) > 1 else (0, 0)
    if path.startswith(ANTHROPIC):
        sizes = f"{tokens} tokens > {context} maximum" if tokens else message
        return f"prompt is too long: {sizes}"
    if message.startswith(_OVERFLOW):
        return message
    if tokens:
        return ContextOverflow.of(tokens, context).message
    return f"{_OVERFLOW} exceeded: {message} ({ContextOverflow.code})"


def count(request: Request, error: ApiError) -> None:
    """Count an error in the metrics of its key and against the key's request limit, but not one
    that the operator has caused on purpose."""
    state = request.scope["state"]
    state["error_code"] = error.code
    counted: Entry | None = state.get("counted")
    if counted is not None and (isinstance(error, RateLimited) or error.status >= 500):
        counted.correct(0)  # who must wait, or whom the box cannot serve, has used nothing
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


def of_store(error: Exception) -> ApiError:
    """The error that a client gets for one of the store's."""
    match error:
        case InvalidValue():
            return InvalidBody(error.message, loc=("body", *error.field.split(".")))
        case RowNotFound():
            return NotFound(error.message)
        case RowConflict():
            return Conflict(error.message)
        case ConversationTooLong():
            return BodyTooLarge(error.message)
        case ResponseNotCompleted():
            return BadRequest(error.message, param="previous_response_id")
    return InternalError(str(error))


async def on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, LoginNeeded):
        return to_login(request)
    api_error = error if isinstance(error, ApiError) else of_store(error)
    count(request, api_error)
    contact = request.app.state.box.config.server.contact
    path = request.url.path
    return response(adapted(api_error, contact, path), path)


def to_login(request: Request) -> Response:
    """To the login, which leads back to the page that was asked for."""
    query = f"?{request.url.query}" if request.url.query else ""
    wanted = urlencode({"next": f"{request.url.path}{query}"})
    return RedirectResponse(
        f"{forwarded_prefix(request.headers)}/login?{wanted}", 303, {"cache-control": "no-store"}
    )


async def on_database_error(request: Request, error: Exception) -> Response:
    """The disk is full since the last check, or the database was locked for too long."""
    log.exception("the database failed", exc_info=error)
    message = f"This box cannot read or write its database now: {error}.  Try again later."
    return await on_error(request, NoNodesAvailable(message, retry_after=5))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: unknown path, wrong method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path, method = quoted(request.url.path), request.method
    routes = request.app.routes
    if status == 404:
        hint = suggestion(method, path, routes)
        return response(NotFound(f"There is no {path} here. {hint}"), request.url.path)
    if status == 405:
        allowed = methods_at(request.url.path, routes)
        message = f"{path} does not accept {method}: use {', '.join(allowed)}."
        refusal = response(MethodNotAllowed(message), request.url.path)
        refusal.headers["Allow"] = ", ".join(allowed)
        return refusal
    return response(BadRequest(f"{method} {path} could not be understood."))
