"""A server on loopback that answers as vLLM does, and fails as a test's script says.

A script is a function that gets the `Exchange` and writes the answer; without one it says a
sentence, word by word, as `answer` does.
"""

from __future__ import annotations

import contextlib
import json
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "meta-llama/Llama-3.3-70B-Instruct"
WORDS = ["The", " sky", " is", " blue", "."]
CONTEXT = 4096


class Exchange:
    """One request, and what is written to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.path, self.body = handler.path, body
        self.headers = dict(handler.headers)
        self.left = threading.Event()  # the client closed the connection before the end
        self._handler = handler
        self._begun = self._cut = False

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._handler.send_response(200)
            self._handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self._handler.send_header("Transfer-Encoding", "chunked")
            self._handler.end_headers()

    def raw(self, data: bytes) -> None:
        try:
            self._begin()
            self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self._handler.wfile.flush()
        except OSError:
            self.left.set()

    def cut(self) -> None:
        """End the connection in the middle of the answer."""
        self._handler.close_connection = True
        self._cut = True

    def end(self) -> None:
        """Of the body, if it is a stream."""
        if self._begun and not self._cut and not self.left.is_set():
            with contextlib.suppress(OSError):
                self._handler.wfile.write(b"0\r\n\r\n")

    def data(self, content: Any) -> None:
        self.raw(f"data: {json.dumps(content)}\n\n".encode())

    def chunk(self, finish_reason: str | None = None, logprobs: Any = None, **delta: Any) -> None:
        """A chunk of a chat with that delta, or of a completion with `content` as its text."""
        choice: dict[str, Any] = {
            "index": 0, "logprobs": logprobs, "finish_reason": finish_reason, "token_ids": None,
        }  # fmt: skip
        if finish_reason is not None:
            choice["stop_reason"] = delta.pop("stop_reason", None)
        choice |= {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        self.data({**self._head(), "choices": [choice]})

    def usage(self, prompt: int, completion: int, cached: int | None = None) -> None:
        """If it was asked for."""
        if (self.body.get("stream_options") or {}).get("include_usage"):
            details = None if cached is None else {"cached_tokens": cached}
            usage = {
                "prompt_tokens": prompt, "total_tokens": prompt + completion,
                "completion_tokens": completion, "prompt_tokens_details": details,
            }  # fmt: skip
            self.data({**self._head(), "choices": [], "usage": usage})

    def done(self) -> None:
        self.raw(b"data: [DONE]\n\n")

    def json(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", "application/json")
        self._handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()
        self._handler.wfile.write(data)

    def error(self, status: int, message: str, kind: str = "BadRequestError", **more: str) -> None:
        error = {"message": message, "type": kind, "param": None, "code": status}
        self.json({"error": error}, status, **more)

    def wait_until_left(self, seconds: float = 20.0) -> None:
        """Until the client closes the connection."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            readable, _, _ = select.select([self._handler.connection], [], [], 0.05)
            if readable:
                self.left.set()
                return

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": self.body["model"]}


Script = Callable[[Exchange], None]


def answer(
    words: Sequence[str] = tuple(WORDS), finish_reason: str = "stop", prompt: int = 12
) -> Script:
    def script(exchange: Exchange) -> None:
        if exchange.is_chat:
            exchange.chunk(role="assistant", content="")
        for word in words:
            exchange.chunk(content=word)
        exchange.chunk(finish_reason, content="")
        exchange.usage(prompt, len(words) + 1)
        exchange.done()

    return script


class VllmServer:
    """`url` is its base URL.  `requests` are those for models, `script` answers them; `polls`
    counts what was asked about its health, which `ill` answers with 500."""

    def __init__(self) -> None:
        self.script: Script = answer()
        self.models = [MODEL]
        self.owners: dict[str, str] = {}  # of its models, unless they are vLLM's own
        self.key = ""  # that requests need
        self.ill = False
        self.polls = 0
        self.requests: list[Exchange] = []
        server = self

        class Handler(_Handler):
            vllm = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def last(self) -> Exchange:
        return self.requests[-1]


class _Handler(BaseHTTPRequestHandler):
    vllm: VllmServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        vllm, exchange = self.vllm, Exchange(self, None)
        vllm.polls += 1
        if vllm.ill:
            exchange.error(500, "out of order", "InternalServerError")
        elif self._refused(exchange):
            pass
        elif self.path == "/v1/models":
            listed = [
                {
                    "id": name,
                    "object": "model",
                    "max_model_len": CONTEXT,
                    "owned_by": vllm.owners.get(name, "vllm"),
                }
                for name in vllm.models
            ]
            exchange.json({"object": "list", "data": listed})
        elif self.path == "/health":
            exchange.json(b"")
        else:
            exchange.json({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        exchange = Exchange(self, body)
        if self._refused(exchange):
            return
        self.vllm.requests.append(exchange)
        if body["model"] not in self.vllm.models:
            message = f"The model `{body['model']}` does not exist."
            exchange.error(404, message, "NotFoundError")
        else:
            self.vllm.script(exchange)
            exchange.end()

    def _refused(self, exchange: Exchange) -> bool:
        if not self.vllm.key or exchange.headers.get("Authorization") == f"Bearer {self.vllm.key}":
            return False
        exchange.json({"error": f"Unauthorized: {exchange.headers.get('Authorization')}"}, 401)
        return True


@contextmanager
def vllm_server() -> Iterator[VllmServer]:
    server = VllmServer()
    try:
        yield server
    finally:
        server.close()
