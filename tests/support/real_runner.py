"""The runner over llama.cpp with the small model that the executable carries."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.models import bundled
from tests.support.tiny_vision import VisionFiles


def seeing_runner(files: VisionFiles, **sizes: int) -> LlamaRunner:
    """Over a tiny model with a projector."""
    digest = hashlib.sha256(files.projector.read_bytes()).hexdigest()
    more: dict[str, Any] = {"projector": str(files.projector), "projector_digest": digest, **sizes}
    return real_runner(files.model, **more)


def real_runner(path: Path | None = None, **settings: Any) -> LlamaRunner:
    location = bundled.find()
    assert location, "the bundled model is not where build/test puts it"
    more: dict[str, Any] = {
        "context": 256,
        "kv_tokens": 2048,
        "max_sequences": 8,
        "token_budget": 256,
        "threads": 1,
        **settings,
    }
    offset = 0 if path else location.offset
    load = LoadModel(path=str(path or location.path), offset=offset, **more)
    return LlamaRunner(load)
