"""Errors as HTTP answers: OpenAI's `error` object and FastAPI's `detail`, always both."""

from __future__ import annotations

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
    NotFound,
)


class JSON(Response):
    """A JSON response of anything that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


ANTHROPIC = "/v1/messages"
_NUMBER = re.compile(r"[0-9]+")
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
    message = error.message
    if isinstance(error, ContextOverflow) and path.startswith(ANTHROPIC):
        message = _too_long(message)
    made: dict[str, Any] = {
        "error": {
            "message": message,
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


def _too_long(message: str) -> str:
    """In the words by which Anthropic's clients know that they have to shorten a conversation."""
    counts = [int(one) for one in _NUMBER.findall(message)]
    if len(counts) < 2:
        return f"prompt is too long: {message}"
    return f"prompt is too long: {max(counts)} tokens > {min(counts)} maximum"


def note(request: Request, error: ApiError) -> None:
    """Count an error that somebody with a key has got, also as one of the key's requests."""
    state = request.scope["state"]
    if arrival := state.get("arrival"):
        arrival.refused(error)
    if key := state.get("key"):
        request.app.state.box.refusals.note(key.id, state.get("model", ""), error.code)


def response(error: ApiError, path: str = "") -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSON(body(error, path), status_code=error.status, headers=headers)


async def on_api_error(request: Request, error: Exception) -> Response:
    shown = error if isinstance(error, ApiError) else InternalError(str(error))
    note(request, shown)
    return response(shown, request.url.path)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path, method = _shortened(request.url.path), request.method
    if status == 404:
        return response(NotFound(f"There is no {path} here: the API is under /v1."))
    if status == 405:
        allowed = (error.headers or {}) if isinstance(error, HTTPException) else {}
        refusal = response(MethodNotAllowed(f"{path} does not take {method}."))
        refusal.headers.update(allowed)  # Allow
        return refusal
    return response(BadRequest(f"{method} {path} could not be understood."))


def _shortened(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:100]}…"
