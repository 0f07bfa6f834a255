"""Between a program and a box: what was sent and answered, and the same in few words for a replay.

A recording holds the `headers` that all requests have, and `requests`, each with `method`, `path`,
more `headers` and `body`.  Members of the body that are those of the request before are named in
`same` instead.  Of requests of one form (which names, what types) the first is kept, and whatever
another refers to.  Texts of programs are theirs: a string of more than 48 characters becomes filler
of at most 120 (but for `EXACT` names), with the words that the script of the fake model looks for.
Keys of the box, folders, UUIDs and a user agent's machine are gone.  `<ID 0.2>` is the third id in
the answer to the first request, and `calls` names the tools that the answer called.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx

FILLER = "Filler text of the same shape. " * 4
LONGEST = 120
SHORT = 48
# Their values are the request's form.
EXACT = {"$ref", "$schema", "const", "definition", "enum", "format", "name", "pattern", "type"}
SECRET = {"authorization", "x-api-key"}
HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
# What the box gives, and what is given back to it.
ID = re.compile(r"\b(?:call|chatcmpl|ctc|fc|msg|resp|rs|toolu)_[0-9A-Za-z]{12,}(?:_\d+)?\b")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ZEROS = "00000000-0000-4000-8000-000000000000"


@dataclass(eq=False)
class Exchange:
    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int = 0
    answer: str = ""

    @property
    def ids(self) -> list[str]:
        return ids_in(self.answer)


def ids_in(answer: str) -> list[str]:
    """The ids that an answer has, in its order."""
    return list(dict.fromkeys(ID.findall(answer)))


def called(text: str) -> list[str]:
    """The tools that an answer calls, in whichever API's shape."""
    streamed = [line[6:] for line in text.split("\n") if line.startswith("data: {")]
    found: dict[str, str] = {}

    def look(value: Any) -> None:
        if isinstance(value, dict):
            name = value.get("name") or (value.get("function") or {}).get("name")
            if name and value.get("id"):  # in a stream, there several times
                found[value["id"]] = name
        for one in value.values() if isinstance(value, dict) else value:
            if isinstance(one, dict | list):
                look(one)

    for one in streamed or ([text] if text.startswith("{") else []):
        look(json.loads(one))
    return list(found.values())


@dataclass
class Recorder:
    """A proxy on loopback before the server at `target`."""

    target: str
    exchanges: list[Exchange] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Recorder]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.url = f"http://localhost:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _handler(recorder: Recorder) -> type[BaseHTTPRequestHandler]:
    client = httpx.Client(base_url=recorder.target, timeout=600, trust_env=False)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):  # programs leave as they like
                super().handle_one_request()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
            exchange = Exchange(self.command, self.path, kept, body.decode())
            recorder.exchanges.append(exchange)
            with client.stream(self.command, self.path, headers=kept, content=body) as answer:
                exchange.status = answer.status_code
                self.send_response_only(answer.status_code)
                for name, value in answer.headers.multi_items():
                    if name not in HOP:
                        self.send_header(name, value)
                whole = self.command == "HEAD" or answer.status_code in (204, 304)
                if not whole:
                    self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                pieces = []
                for piece in answer.iter_raw():
                    pieces.append(piece)
                    if piece and not whole:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if not whole:
                    self.wfile.write(b"0\r\n\r\n")
            told = httpx.Response(200, headers=answer.headers, content=b"".join(pieces))
            exchange.answer = told.text

        do_DELETE = do_GET = do_HEAD = do_OPTIONS = do_POST = do_PUT = forward  # noqa: N815

    return Handler


# -- for a replay ----------------------------------------------------------------------------------


def compact(
    exchanges: Sequence[Exchange], words: Sequence[str], hide: dict[str, str]
) -> dict[str, Any]:
    """A recording of the requests.  `words` are what a script looks for, `hide` says what is put in
    place of texts such as folders."""
    made: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    ids: dict[str, str] = {}
    for number, one in enumerate(_once(exchanges)):
        hidden = {**ids, **hide}
        headers = {name.lower(): _hidden(value, hidden) for name, value in one.headers.items()}
        request: dict[str, Any] = {
            "method": one.method,
            "path": _hidden(one.path, hidden),
            "headers": {k: _header(k, v) for k, v in headers.items() if k not in SECRET},
        }
        if one.body:
            body = _short(json.loads(_hidden(one.body, hidden)), words)
            same = [name for name in body if name in before and before[name] == body[name]]
            if same:
                request["same"] = same
            request["body"] = {k: v for k, v in body.items() if k not in same}
            before = body
        if calls := called(one.answer):
            request["calls"] = calls
        made.append(request)
        ids |= {text: f"<ID {number}.{n}>" for n, text in enumerate(one.ids)}
    common = dict(set.intersection(*(set(one["headers"].items()) for one in made)))
    for request in made:
        own = {k: v for k, v in request["headers"].items() if k not in common}
        request["headers"] = own
    return {"headers": dict(sorted(common.items())), "requests": made}


def _once(exchanges: Sequence[Exchange]) -> list[Exchange]:
    seen: set[str] = set()
    kept: list[Exchange] = []
    for one in exchanges:
        form = f"{one.method} {one.path} {_form(json.loads(one.body or 'null'))}"
        if form not in seen:
            kept.append(one)
        seen.add(form)
    for one in reversed(exchanges):
        wanted = any(text in other.body + other.path for other in kept for text in one.ids)
        if wanted and one not in kept:
            kept.append(one)
    return [one for one in exchanges if one in kept]


def _form(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("type")
        named = {name: _form(one) for name, one in value.items()}
        return f"{kind if isinstance(kind, str) else ''}{dict(sorted(named.items()))}"
    if isinstance(value, list):
        return str(list(map(_form, value)))
    return type(value).__name__


def expanded(recording: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests of a recording, each with all its headers and its whole body."""
    made = []
    before: dict[str, Any] = {}
    for one in recording["requests"]:
        body = one.get("body")
        if body is not None:
            before = body = {**{name: before[name] for name in one.get("same", ())}, **body}
        headers = {**recording["headers"], **one["headers"]}
        made.append({**one, "headers": headers, "body": body})
    return made


def with_ids(text: str, answers: Sequence[list[str]]) -> str:
    """With the ids that these answers gave in place of those that are named by number."""

    def one(match: re.Match[str]) -> str:
        return answers[int(match[1])][int(match[2])]

    return re.sub(r"<ID (\d+)\.(\d+)>", one, text)


def _hidden(text: str, instead: dict[str, str]) -> str:
    for secret, shown in instead.items():
        text = text.replace(secret, shown)
    return UUID.sub(ZEROS, text)


def _header(name: str, value: str) -> str:
    if name == "user-agent":
        return re.sub(r"\(.*?\)", "(Linux)", value)
    long = value.startswith("{") or (len(value) > LONGEST and "," not in value)
    return FILLER[: min(len(value), LONGEST)] if long else value


def _short(value: Any, words: Sequence[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _short(one, words, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_short(one, words, key) for one in value]
    if not isinstance(value, str) or len(value) <= SHORT or key in EXACT:
        return value
    if key == "arguments":  # JSON in JSON
        with contextlib.suppress(ValueError):
            return json.dumps(_short(json.loads(value), words))
    kept = "".join(f"\n{word}" for word in words if word in value)
    return FILLER[: min(len(value), LONGEST)] + kept + "".join(ID_MARK.findall(value))


ID_MARK = re.compile(r"<ID \d+\.\d+>")
