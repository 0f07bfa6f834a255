"""A server on loopback that speaks the protocols of registries, and fails as it is told.

It has OCI repositories under `/v2/`, and repositories of the Hub under `/api/models/` with their
files at `/OWNER/REPO/resolve/COMMIT/FILE`.  Files are behind a redirect to `/cas/DIGEST`, as on the
real ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_LAYER = "application/vnd.ollama.image.model"
CONFIGURATION = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


@dataclass
class Faults:
    """What goes wrong.  `cut_after` bytes of a file the connection ends, `cuts` times.  `statuses`
    come before the next answers for files.  `pause` is waited for in the middle of a file."""

    cut_after: int = 0
    cuts: int = 0
    statuses: list[int] = field(default_factory=list)
    without_ranges: bool = False
    wrong_bytes: bool = False
    wrong_size: int = 0
    wrong_range: bool = False
    token: str = ""  # that requests need; "oci": a token that the registry hands out
    pause: threading.Event | None = None


class RegistryServer:
    """`url` is its base; `requests` counts paths, `ranges` are those that were asked for."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, dict[str, Any]] = {}
        self.repositories: dict[str, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.searches: list[dict[str, list[str]]] = []  # what was asked for
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.credentials: list[tuple[str, str]] = []  # path and Authorization
        self.lock = threading.Lock()
        self.before_file: Callable[[], None] | None = None  # called before a file is sent
        server = self

        class Handler(_Handler):
            registry = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def add_ollama(self, name: str, weights: bytes, **layers: bytes | str) -> str:
        """`name` as `library/llama3.2:1b`; other layers by their kind.  Returns the digest."""
        kinds = {"model": weights, **layers}
        described = []
        for kind, content in kinds.items():
            data = content.encode() if isinstance(content, str) else content
            digest = self.add_blob(data)
            described.append(
                {
                    "mediaType": f"application/vnd.ollama.image.{kind}",
                    "digest": f"sha256:{digest}",
                    "size": len(data) + self.faults.wrong_size * (kind == "model"),
                }
            )
        self.manifests[name] = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": described}
        return hashlib.sha256(weights).hexdigest()

    def add_image(
        self, name: str, layers: Sequence[tuple[str, bytes]], configuration: bytes = b"{}"
    ) -> None:
        """`name` as `library/llama3.2:1b`; `layers` are media types and contents."""

        def described(kind: str, data: bytes) -> dict[str, Any]:
            digest = f"sha256:{self.add_blob(data)}"
            return {"mediaType": kind, "digest": digest, "size": len(data)}

        self.manifests[name] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described(CONFIGURATION, configuration),
            "layers": [described(kind, data) for kind, data in layers],
        }

    def add_hub(self, repository: str, files: dict[str, bytes], **card: Any) -> None:
        siblings = [
            {
                "rfilename": name,
                "lfs": {"sha256": self.add_blob(data), "size": len(data)},
            }
            for name, data in files.items()
        ]
        self.repositories[repository] = {
            "sha": COMMIT, "siblings": [{"rfilename": "README.md"}, *siblings], "cardData": card,
        }  # fmt: skip

    def add_found(self, name: str, **fields: Any) -> None:
        """What a search of the Hub finds; `fields` as in its answers."""
        self.found[name] = fields


class _Handler(BaseHTTPRequestHandler):
    registry: RegistryServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # clients leave as they like
            super().handle_one_request()

    def do_GET(self) -> None:
        registry, path = self.registry, self.path.partition("?")[0]
        with registry.lock:
            registry.requests[path] += 1
            registry.credentials.append((path, self.headers.get("Authorization", "")))
        if path == "/token":
            return self._json({"token": "oci"})
        if path.startswith("/cas/"):
            return self._file(registry.blobs[path.removeprefix("/cas/")])
        if (token := registry.faults.token) and not self._authorized(token):
            return None
        if match := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            return self._json(registry.manifests.get(f"{match[1]}:{match[2]}"))
        if match := re.fullmatch(r"/v2/.+/blobs/sha256:(.+)", path):
            return self._redirect(match[1])
        if path == "/api/models":
            return self._search()
        if match := re.fullmatch(r"/api/models/(.+)", path):
            return self._json(registry.repositories.get(match[1]))
        if match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            files = registry.repositories[match[1]]["siblings"]
            digests = {each["rfilename"]: each.get("lfs", {}).get("sha256") for each in files}
            return self._redirect(digests[match[2]])
        if match := re.fullmatch(r"/files/([0-9a-f]{64})/.+", path):
            return self._file(registry.blobs[match[1]])
        return self._json(None)

    def _authorized(self, token: str) -> bool:
        if self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self.send_response(401)
        if token == "oci":
            realm = f'Bearer realm="{self.registry.url}/token",service="r",scope="pull"'
            self.send_header("WWW-Authenticate", realm)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _redirect(self, digest: str) -> None:
        self.send_response(307)
        # Another host name, so that a client which keeps credentials across hosts is found out.
        port = self.registry.url.rpartition(":")[2]
        self.send_header("Location", f"http://localhost:{port}/cas/{digest}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _search(self) -> None:
        query = parse_qs(self.path.partition("?")[2])
        self.registry.searches.append(query)
        words = query["search"][0].lower().split()
        found = self.registry.found.items()
        self._json([
            {"_id": "6581", "id": name, **fields}
            for name, fields in found
            if all(word in name.lower() for word in words)
        ][: int(query["limit"][0])])  # fmt: skip

    def _json(self, content: Any) -> None:
        known = content is not None
        data = json.dumps(content if known else {"errors": [{"code": "MANIFEST_UNKNOWN"}]}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, data: bytes) -> None:
        if self.registry.before_file is not None:
            self.registry.before_file()
        faults = self.registry.faults
        with self.registry.lock:
            status = faults.statuses.pop(0) if faults.statuses else 0
            self.registry.ranges.append(self.headers.get("Range", ""))
            cut = not status and faults.cuts > 0
            faults.cuts -= cut
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin, end = 0, len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and not faults.without_ranges:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            self.send_response(206)
            shown = begin + 1 if faults.wrong_range else begin
            self.send_header("Content-Range", f"bytes {shown}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        part = data[begin:end]
        if faults.wrong_bytes:
            part = bytes([part[0] ^ 1]) + part[1:]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if cut:
            self.wfile.write(part[: faults.cut_after])
            self.close_connection = True
            return
        if faults.pause is not None and len(part) > 1:
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            faults.pause.wait(60)
            part = part[len(part) // 2 :]
        self.wfile.write(part)


@contextmanager
def registry_server() -> Iterator[RegistryServer]:
    server = RegistryServer()
    try:
        yield server
    finally:
        server.close()
