"""An upstream whose answers are held between their first word and the rest."""

from __future__ import annotations

import json
import select
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "far"
WORDS = ("first", " rest")


class HeldUpstream:
    """It waits for `begin` before the first word, and for `go_on` before the rest; both are set.

    `left` counts the requests whose box has closed the connection meanwhile, `sizes` are those of
    the bodies that came.
    """

    def __init__(self) -> None:
        self.begin, self.go_on = threading.Event(), threading.Event()
        self.begin.set()
        self.go_on.set()
        self.fails = False
        self.left = 0
        self.sizes: list[int] = []
        self.traceparents: list[str | None] = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                self.rfile.read(size)
                upstream.sizes.append(size)
                upstream.traceparents.append(self.headers.get("traceparent"))
                if upstream.fails:
                    self.answer(500, {"error": {"message": "broken"}})
                    return
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for event, word in zip((upstream.begin, upstream.go_on), WORDS, strict=True):
                    if not self.waits_for(event):
                        upstream.left += 1
                        return
                    reason = "stop" if word == WORDS[-1] else None
                    choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
                    chunk = {"object": "chat.completion.chunk", "choices": [choice], "model": MODEL}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def waits_for(self, event: threading.Event) -> bool:
                """False if the box has closed the connection first."""
                while not event.wait(0.02):
                    readable, _, _ = select.select([self.connection], [], [], 0)
                    if readable:
                        return False
                return True

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.port = self._server.server_port
        self.config = f'[[upstream]]\nname = "gpu"\nurl = "http://127.0.0.1:{self.port}/v1"\n'

    def close(self) -> None:
        self.begin.set()
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
