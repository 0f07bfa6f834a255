"""Debian's `docker-registry` on loopback, and images pushed to it."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.ports import free_port
from tests.support.process_box import wait_until
from tests.support.registry_server import CONFIGURATION, MANIFEST

INSTALLED = shutil.which("docker-registry") is not None
MISSING = "docker-registry is not installed (Debian's package of that name)"
_CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@contextmanager
def docker_registry(folder: Path) -> Iterator[str]:
    """Run one that keeps its files in that folder; returns its base URL."""
    port = free_port(socket.SOCK_STREAM)
    (folder / "registry.yml").write_text(_CONFIG.format(folder=folder / "data", port=port))
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "registry.yml"], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: _answers(url), "the registry answers")
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/", timeout=60, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def push(
    url: str,
    repository: str,
    tag: str,
    layers: Sequence[tuple[str, bytes]],
    configuration: bytes = b"{}",
) -> None:
    """`layers` are media types and contents."""
    base = f"{url}/v2/{repository}"
    with httpx.Client(trust_env=False, timeout=60) as client:

        def put_blob(data: bytes) -> str:
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            location = httpx.URL(client.post(f"{base}/blobs/uploads/").headers["Location"])
            done = client.put(location.copy_add_param("digest", digest), content=data)
            assert done.status_code == 201, done.text
            return digest

        content = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIGURATION,
                "digest": put_blob(configuration),
                "size": len(configuration),
            },
            "layers": [
                {"mediaType": kind, "digest": put_blob(data), "size": len(data)}
                for kind, data in layers
            ],
        }
        done = client.put(
            f"{base}/manifests/{tag}",
            content=json.dumps(content),
            headers={"Content-Type": MANIFEST},
        )
        assert done.status_code == 201, done.text
