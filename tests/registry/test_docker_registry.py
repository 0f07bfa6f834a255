"""Models from a real OCI registry: Debian's `docker-registry`, with Ollama's media types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.config import RegistryConfig
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.registry import manifest
from pinaivu_box.registry.client import RegistryClient
from pinaivu_box.registry.reference import RegistryModel, parse
from pinaivu_box.registry.transfer import Transfer
from tests.support.docker_registry import INSTALLED, MISSING, docker_registry, push

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not INSTALLED, reason=MISSING),
]
WEIGHTS = os.urandom(PIECE_BYTES * 20 + 7)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a registry that has `lab/tiny:1b`."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as url:
        layers = [
            ("application/vnd.ollama.image.model", WEIGHTS),
            ("application/vnd.ollama.image.license", b"Be nice."),
            ("application/vnd.ollama.image.params", b'{"temperature": 0.25}'),
        ]
        push(url, "lab/tiny", "1b", layers)
        yield url


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
