"""A server on loopback with images, that also sends elsewhere and answers too much."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.tiny_vision import image

RED = image(red=200)


class ImageServer:
    """`requests` are the paths that were asked for."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        server = self

        class Handler(_Handler):
            images = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


class _Handler(BaseHTTPRequestHandler):
    images: ImageServer

    def do_GET(self) -> None:
        self.images.requests.append(self.path)
        match self.path:
            case "/red.png":
                self._answer(200, RED)
            case "/moved":
                self._answer(302, to="/red.png")
            case "/elsewhere":
                self._answer(302, to=self.images.url("/red.png", "localhost"))
            case "/file":
                self._answer(302, to="file:///etc/passwd")
            case "/again":
                self._answer(302, to="/again")
            case "/large":
                self._answer(200, bytes(3_000_000))
            case _:
                self._answer(404)

    def _answer(self, status: int, body: bytes = b"", to: str = "") -> None:
        self.send_response(status)
        if to:
            self.send_header("Location", to)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def image_server() -> Iterator[ImageServer]:
    server = ImageServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
