"""ASGI middleware: the id of a request, its normalised path, and its line in the log."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from pinaivu_box.server.pages import errors
from pinaivu_box.server.paths import normalise
from pinaivu_box.store.keys import PREFIX

log = logging.getLogger("pinaivu.http")

# Some clients put their key into the path; one-time links have their token there.
_SECRET = re.compile(rf"(?<={PREFIX})[^/\s]+|(?<=/login/link/)[^/\s]+")
_UNQUOTED = "!#$&'*+-.^_`|~:/[]"  # beside letters and digits, in a list in a header
_MAX_HEADER_CHARACTERS = 2000
_MAX_PATH_CHARACTERS = 300  # that are logged
POLLED_PATHS = {"/health", "/readyz", "/metrics"}  # every few seconds, by monitoring


def new_request_id() -> str:
    return f"req_{ULID()}".lower()


def _header_list(names: list[str]) -> str:
    """Comma-separated, with characters that a header cannot carry percent-encoded."""
    quoted, size = [], 0
    for name in names:
        quoted.append(quote(name, safe=_UNQUOTED))
        size += len(quoted[-1]) + 2
        if size > _MAX_HEADER_CHARACTERS:
            quoted[-1] = "..."
            break
    return ", ".join(quoted)


class AccessLog:
    """Gives each request an id (`scope["state"]["request_id"]`), answers 500 if it raises, and logs
    it when it ends.

    An inference request is logged when its receipt is written: it sets `state["logged"]`.
    `answered` is told of each, with its status; `InferenceCall` notes in its state whether it would
    run a model.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[Scope, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = normalise(scope["path"])
        request_id = new_request_id()
        state = {**scope.get("state", {}), "request_id": request_id}
        scope = {**scope, "path": path, "state": state}
        began = time.monotonic()
        status = 500
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                rate_limits = state.get("rate_limits")  # see `auth`
                limits = await rate_limits() if rate_limits else {}
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                headers.update(limits)
                headers["x-request-id"] = request_id
                headers["request-id"] = request_id  # Anthropic's
                if route := state.get("route"):
                    headers["x-pinaivu-route"] = route
                if ignored := state.get("ignored"):
                    headers["x-pinaivu-ignored"] = _header_list(ignored)
                headers["openai-processing-ms"] = str(round((time.monotonic() - began) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise  # too late for an answer: the connection is closed
            state.pop("rate_limits", None)  # may be what failed
            await errors.on_failure(scope)(scope, receive, send_with_headers)
        finally:
            self._answered(scope, status)
            if release := state.pop("release_body", None):  # see `bodies`
                release()
            if not state.get("logged"):
                key = state.get("key")
                fields = {
                    "request_id": request_id,
                    "key": key.id if key else None,
                    "key_name": (key.name or None) if key else None,
                    "method": scope["method"],
                    "path": _SECRET.sub("...", path)[:_MAX_PATH_CHARACTERS],
                    "status": status,
                    "total_ms": round((time.monotonic() - began) * 1000),
                }
                level = logging.DEBUG if path in POLLED_PATHS else logging.INFO
                log.log(level, "http", extra={"fields": fields})
