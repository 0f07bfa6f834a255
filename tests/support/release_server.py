"""A page of releases on loopback, laid out as GitHub's, which lies as it is told."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.released_files import ReleasedFiles, released

_PLATFORM = f"linux-{platform.machine()}"
Answer = Callable[[BaseHTTPRequestHandler], None]


class ReleaseServer:
    """`url` is the page.  `instead` has what is answered in the place of a file, by its name;
    `asked` are the paths of all requests."""

    def __init__(self, folder: Path) -> None:
        self.instead: dict[str, Answer] = {}
        self.asked: list[str] = []
        self._folder = folder
        self._releases: dict[str, ReleasedFiles] = {}
        self._latest = ""
        folder.mkdir(exist_ok=True)
        self._key = released(folder / "key", {}).key
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/releases"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def public_key(self) -> bytes:
        return ReleasedFiles(self._folder, self._key).public_key

    def release(self, version: str, *variants: str, content: bytes | None = None) -> ReleasedFiles:
        """Release executables, which say their version unless there is other content; it is the
        newest from now on."""
        made = ReleasedFiles(self._folder / version, self._key)
        made.folder.mkdir()
        for variant in ("", *variants):
            name = name_of(version, variant)
            made.add(name, fake_executable(version, variant) if content is None else content)
        self._releases[version] = made
        self._latest = version
        return made

    def replace(self, version: str, files: ReleasedFiles) -> None:
        """Have other files in the place of those of a release."""
        self._releases[version] = files

    def file(self, path: str) -> bytes | None:
        match path.strip("/").split("/"):
            case ["releases", "latest", "download", name]:
                version = self._latest
            case ["releases", "download", tag, name]:
                version = tag.removeprefix("v")
            case _:
                return None
        release = self._releases.get(version)
        found = release.folder / name if release else None
        return found.read_bytes() if found and found.is_file() else None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def release_server(folder: Path) -> Iterator[ReleaseServer]:
    server = ReleaseServer(folder)
    yield server
    server.close()


def name_of(version: str, variant: str = "") -> str:
    return f"pinaivu-{version}-{_PLATFORM}" + (f"-{variant}" if variant else "")


def fake_executable(version: str, variant: str = "") -> bytes:
    return f"#!/bin/sh\n# {variant}\necho 'pinaivu, version {version}'\n".encode()


def sums_line(name: str, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n"


# -- what is answered instead ---------------------------------------------------------------------


def status(code: int) -> Answer:
    return lambda request: request.send_error(code)


def content(data: bytes) -> Answer:
    return lambda request: _send(request, data, len(data))


def cut_off(data: bytes) -> Answer:
    """Half of the data, and then the end of the connection."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _send(request, data[: len(data) // 2], len(data))
        request.close_connection = True

    return answer


def redirect(url: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    with suppress(OSError):  # whoever reads it has had enough
        while True:
            request.wfile.write(b"x" * 65536)


def _send(request: BaseHTTPRequestHandler, data: bytes, length: int) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    with suppress(OSError):
        request.wfile.write(data)


def _handler(server: ReleaseServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            name = self.path.rpartition("/")[2]
            if answer := server.instead.get(name):
                answer(self)
            elif (data := server.file(self.path)) is not None:
                _send(self, data, len(data))
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
