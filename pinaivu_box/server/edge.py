"""Pure ASGI around the whole app: paths as people write them, request ids, the access log."""

from __future__ import annotations

import logging
import re
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from pinaivu_box.errors import InternalError
from pinaivu_box.server import envelope
from pinaivu_box.store.keys import PREFIX
from pinaivu_box.text import END

log = logging.getLogger("pinaivu.http")

_ABSOLUTE = re.compile(r"^https?://[^/?#]*", re.IGNORECASE)  # RFC 9112, section 3.2.2
_SECRET = re.compile(rf"{PREFIX}[^/\s]+")  # has no place in a path, but ends up there
_DOUBLED = re.compile(rf"^(?:/v1)+(?=/v1(?:/|{END}))")
_PREFIX = re.compile(rf"(?:/[A-Za-z0-9._~-]+)+{END}")
_LONGEST_PREFIX = 200
_PLAIN = "!#$&'*+-.^_`|~:/[]"  # beside letters and digits, in a list in a header
_LONGEST_HEADER = 2000
_LONGEST_PATH = 300  # characters of it that are logged
QUIET = {"/health", "/readyz", "/metrics"}  # polled every few seconds


def new_request_id() -> str:
    return f"req_{ULID()}".lower()


def normalise(path: str) -> str:
    """`/v1/v1/models/` and `//v1/models` are `/v1/models`: base URLs get pasted in every way."""
    path = re.sub(r"/{2,}", "/", _ABSOLUTE.sub("", path))
    return _DOUBLED.sub("", path).rstrip("/") or "/"


def prefix_of(headers: Headers) -> str:
    """The path under which a reverse proxy shows this box, and which it takes off; "" for none.

    From `X-Forwarded-Prefix`, where each proxy of a chain puts its own behind a comma.
    """
    parts = headers.get("x-forwarded-prefix", "").split(",")
    prefix = "".join(part.strip().rstrip("/") for part in parts)
    # It is said again in addresses: one that began with two slashes would name another host.
    return prefix if len(prefix) <= _LONGEST_PREFIX and _PREFIX.match(prefix) else ""


def _listed(names: list[str]) -> str:
    """As a header: with commas between them, and what a header cannot carry percent-encoded."""
    listed, size = [], 0
    for name in names:
        listed.append(quote(name, safe=_PLAIN))
        size += len(listed[-1]) + 2
        if size > _LONGEST_HEADER:
            listed[-1] = "..."
            break
    return ", ".join(listed)


class Edge:
    """Gives each request an id (`scope["state"]["request_id"]`), and logs it when it ends.

    An inference request logs itself when its receipt is written: it sets `state["logged"]`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = (
                    request_id  # OpenAI's, Anthropic's
                )
                if route := state.get("route"):
                    headers["x-pinaivu-route"] = route
                if ignored := state.get("ignored"):
                    headers["x-pinaivu-ignored"] = _listed(ignored)
                headers["openai-processing-ms"] = str(round((time.monotonic() - began) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise  # too late for an answer: the connection breaks off
            error = InternalError("The box failed on this request; its log says why.")
            await envelope.response(error)(scope, receive, send_with_headers)
        finally:
            if room := state.pop("room", None):  # of a body, see `bodies`
                room()
            if not state.get("logged"):
                key = state.get("key")
                fields = {
                    "request_id": request_id,
                    "key": key.id if key else None,
                    "method": scope["method"],
                    "path": _SECRET.sub(f"{PREFIX}...", path)[:_LONGEST_PATH],
                    "status": status,
                    "total_ms": round((time.monotonic() - began) * 1000),
                }
                level = logging.DEBUG if path in QUIET else logging.INFO
                log.log(level, "http", extra={"fields": fields})
