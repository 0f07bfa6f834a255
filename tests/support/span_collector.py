"""A collector of spans on loopback, which takes OTLP's JSON encoding and nothing else."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.process_box import wait_until

_KINDS = {1: "internal", 2: "server", 3: "client"}
_HEX = {"traceId": 32, "spanId": 16, "parentSpanId": 16}
_FIELDS = {
    *("traceId", "spanId", "parentSpanId", "name", "kind", "startTimeUnixNano"),
    *("endTimeUnixNano", "attributes", "status"),
}


@dataclass(frozen=True)
class TakenSpan:
    """`parent` is "" at the root of a trace of this box."""

    trace: str
    span: str
    parent: str
    name: str
    kind: str
    began: int
    ended: int
    attributes: dict[str, Any]
    failed: bool


class Collector:
    """`status` and `answer` are what it says; `hold` keeps it from saying anything."""

    def __init__(self) -> None:
        self.spans: list[TakenSpan] = []
        self.resource: dict[str, Any] = {}
        self.requests: list[dict[str, str]] = []  # their headers
        self.bodies: list[bytes] = []
        self.status, self.answer = 200, b"{}"
        self.headers: dict[str, str] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector._take(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(dict(handler.headers.items()))
        self.bodies.append(body)
        self.go_on.wait(180)
        if self.status == 200:
            self.spans += self._read(json.loads(body))
        handler.send_response(self.status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.answer)))
        handler.end_headers()
        handler.wfile.write(self.answer)

    def _read(self, message: dict[str, Any]) -> list[TakenSpan]:
        assert list(message) == ["resourceSpans"]
        found = []
        for group in message["resourceSpans"]:
            self.resource = attributes(group["resource"]["attributes"])
            for scope in group["scopeSpans"]:
                assert scope["scope"]["name"]
                found += [_span(span) for span in scope["spans"]]
        return found

    def named(self, name: str, count: int = 1) -> list[TakenSpan]:
        """Wait for so many spans of that name."""

        def taken() -> list[TakenSpan]:
            return [span for span in self.spans if span.name == name]

        wait_until(lambda: len(taken()) >= count, f"{count} spans named {name}")
        return taken()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()


def _span(span: dict[str, Any]) -> TakenSpan:
    assert set(span) <= _FIELDS, span
    for name, length in _HEX.items():
        if name in span:
            assert re.fullmatch(f"[0-9a-f]{{{length}}}", span[name]) and int(span[name], 16)
    began, ended = (int(span[name]) for name in ("startTimeUnixNano", "endTimeUnixNano"))
    assert isinstance(span["startTimeUnixNano"], str) and 10**18 < began <= ended < 10**19
    return TakenSpan(
        span["traceId"], span["spanId"], span.get("parentSpanId", ""), span["name"],
        _KINDS[span["kind"]], began, ended, attributes(span["attributes"]),
        span.get("status", {}).get("code") == 2,
    )  # fmt: skip


def attributes(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        assert set(pair) == {"key", "value"}
        assert pair["key"] not in found
        found[pair["key"]] = _value(pair["value"])
    return found


def _value(value: dict[str, Any]) -> Any:
    ((kind, inner),) = value.items()
    match kind:
        case "stringValue":
            assert isinstance(inner, str)
            return inner
        case "intValue":
            assert isinstance(inner, str)
            return int(inner)
        case "doubleValue":
            assert isinstance(inner, float)
            return inner
        case "boolValue":
            assert isinstance(inner, bool)
            return inner
        case "arrayValue":
            return [_value(each) for each in inner["values"]]
    raise AssertionError(kind)
