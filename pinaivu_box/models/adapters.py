"""LoRA adapters of a model: small GGUF files that change what it says, and so its digest."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pinaivu_box.config import AdapterConfig
from pinaivu_box.models import gguf
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.names import printable
from pinaivu_box.models.regular_files import stat_regular

_DIGEST_DOMAIN = b"pinaivu/model-adapters/v1\n"


class ModelAdapter(NamedTuple):
    """A file of so many bytes; its weights are multiplied by `scale` and added to the model's."""

    path: Path
    size: int
    scale: float


def read(
    adapters: Iterable[AdapterConfig], architecture: str, headers: HeaderReader
) -> tuple[ModelAdapter, ...]:
    """The adapters of a model of that architecture.  Raises BadGguf."""
    return tuple(_read(adapter, architecture, headers) for adapter in adapters)


def digest_with(base: str, adapters: Sequence[tuple[str, float]]) -> str:
    """The digest of a model with adapters, from that of the model without them and those of their
    files, each with its scale; see docs/receipts.md."""
    joined = b"".join(
        bytes.fromhex(digest) + struct.pack(">f", scale + 0.0) for digest, scale in adapters
    )
    count = len(adapters).to_bytes(4, "big")
    return hashlib.sha256(_DIGEST_DOMAIN + bytes.fromhex(base) + count + joined).hexdigest()


def _read(adapter: AdapterConfig, architecture: str, headers: HeaderReader) -> ModelAdapter:
    try:
        path = Path(os.path.realpath(Path(adapter.path).expanduser()))
        str(path).encode()  # it is sent to the engine in UTF-8
        facts = stat_regular(path)
        gguf.check_adapter(headers.read(path, facts), architecture)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        why = getattr(error, "strerror", None) or error
        raise BadGguf(f"its adapter {printable(adapter.path)}: {why}") from error
    return ModelAdapter(path, facts.st_size, adapter.scale)
