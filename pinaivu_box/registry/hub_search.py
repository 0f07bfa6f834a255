"""Searches the Hugging Face Hub for repositories with GGUF files.

It is asked only when somebody wants it, and is told nothing but the words.  Registries that speak
the OCI distribution specification, Ollama's among them, have no search for programs.  The query is
that of the Hub's public API (`GET /api/models`), as its own Python client sends it.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct

from pinaivu_box.config import RegistryConfig
from pinaivu_box.errors import PullFailed
from pinaivu_box.models.names import printable
from pinaivu_box.registry.reference import host_of, parse

MAX_RESULTS = 25
_SECONDS = 30.0  # for the whole answer: somebody waits for it
_FIELDS = ("downloads", "likes", "gated", "tags", "gguf")
_MAX_TEXT = 60  # characters of a licence or an architecture
_LICENSE = "license:"  # what the tag of a licence begins with


class FoundModel(Struct, frozen=True):
    """A repository: `name` is what to pull, with the usual quantisation, or with `:QUANT` behind it
    with another.  `downloads` are those of a month; `parameters` and `context` (in tokens) are 0,
    texts empty, where the Hub does not know.  What is `gated` is had by those only who have
    accepted its terms there."""

    name: str
    downloads: int
    likes: int
    parameters: int
    context: int
    architecture: str
    license: str
    gated: bool


class _Header(Struct):
    """What the Hub has read in one of the files."""

    total: Any = 0
    context_length: Any = 0
    architecture: Any = ""


class _Repository(Struct):
    id: str
    downloads: Any = 0
    likes: Any = 0
    gated: Any = False
    tags: Any = None
    gguf: _Header | None = None


async def search(words: str, config: RegistryConfig) -> list[FoundModel]:
    """Return what fits the words, at most MAX_RESULTS, the most downloaded first.  Raises
    PullFailed."""
    from pinaivu_box.registry.client import RegistryClient, hub_token  # loads httpx

    query = [("search", words), ("filter", "gguf"), ("sort", "downloads"), ("direction", "-1"),
             ("limit", str(MAX_RESULTS)), *(("expand", name) for name in _FIELDS)]  # fmt: skip
    url = f"{config.hub}/api/models?{urlencode(query)}"
    try:
        async with asyncio.timeout(_SECONDS), RegistryClient(config.hub, hub_token()) as client:
            found = await client.document(url, list[_Repository])
    except TimeoutError:
        raise PullFailed(
            f"{host_of(config.hub)} has not answered in {_SECONDS:.0f} s: try again later."
        ) from None
    models = (_found(each, config) for each in found[:MAX_RESULTS])
    return [model for model in models if model is not None]


def _found(repository: _Repository, config: RegistryConfig) -> FoundModel | None:
    """None for a name that could not be pulled."""
    name = f"hf.co/{repository.id}"
    try:
        parse(name, config)
    except PullFailed:
        return None
    header = repository.gguf or _Header()
    tags = repository.tags if isinstance(repository.tags, list) else []
    licenses = [tag for tag in tags if isinstance(tag, str) and tag.startswith(_LICENSE)]
    return FoundModel(
        name,
        downloads=_count(repository.downloads),
        likes=_count(repository.likes),
        parameters=_count(header.total),
        context=_count(header.context_length),
        architecture=_text(header.architecture),
        license=_text(licenses[0].removeprefix(_LICENSE)) if licenses else "",
        gated=repository.gated not in (False, None),
    )


def _count(value: Any) -> int:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if known else 0


def _text(value: Any) -> str:
    return printable(value, _MAX_TEXT) if isinstance(value, str) else ""
