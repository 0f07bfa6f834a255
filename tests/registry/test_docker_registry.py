"""Models from a real OCI registry: Debian's `docker-registry`, with Ollama's media types."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pinaivu_box.config import RegistryConfig
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.registry import manifest
from pinaivu_box.registry.client import RegistryClient
from pinaivu_box.registry.reference import RegistryModel, parse
from pinaivu_box.registry.transfer import Transfer
from tests.support.ports import free_port
from tests.support.process_box import wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        shutil.which("docker-registry") is None,
        reason="docker-registry is not installed (Debian's package of that name)",
    ),
]
WEIGHTS = os.urandom(PIECE_BYTES * 20 + 7)
CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIGURATION = "application/vnd.docker.container.image.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a registry that has `lab/tiny:1b`."""
    folder, port = tmp_path_factory.mktemp("registry"), free_port(socket.SOCK_STREAM)
    (folder / "registry.yml").write_text(CONFIG.format(folder=folder / "data", port=port))
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "registry.yml"], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: answers(url), "the registry answers")
        layers = {
            "application/vnd.ollama.image.model": WEIGHTS,
            "application/vnd.ollama.image.license": b"Be nice.",
            "application/vnd.ollama.image.params": b'{"temperature": 0.25}',
        }
        push(url, "lab/tiny", "1b", layers)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def push(url: str, repository: str, tag: str, layers: dict[str, bytes]) -> None:
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
            "config": {"mediaType": CONFIGURATION, "digest": put_blob(b"{}"), "size": 2},
            "layers": [
                {"mediaType": kind, "digest": put_blob(data), "size": len(data)}
                for kind, data in layers.items()
            ],
        }
        done = client.put(
            f"{base}/manifests/{tag}",
            content=json.dumps(content),
            headers={"Content-Type": MANIFEST},
        )
        assert done.status_code == 201, done.text


@pytest.mark.parametrize("name", ["lab/tiny:1b", "HOST/lab/tiny:1b"])
async def test_a_model_comes_from_a_real_registry(registry: str, name: str, tmp_path: Path) -> None:
    """By the short name where the registry is the configured one, and by its host."""
    host = registry.partition("://")[2]
    reference = parse(name.replace("HOST", host), RegistryConfig(ollama=registry))
    assert isinstance(reference, RegistryModel)
    async with RegistryClient(reference.base) as client:
        listing = await manifest.of_registry(client, reference)
        assert (listing.record.license, listing.record.parameters.temperature) == ("Be nice.", 0.25)
        transfer = Transfer(client, listing, tmp_path)
        await transfer.run()
    assert transfer.files[0][0].read_bytes() == WEIGHTS
