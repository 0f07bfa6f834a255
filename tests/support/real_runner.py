"""The runner over llama.cpp with the small model that the executable carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.models import bundled


def real_runner(path: Path | None = None, **sizes: int) -> LlamaRunner:
    location = bundled.find()
    assert location, "the bundled model is not where build/test puts it"
    more: dict[str, Any] = {
        "context": 256,
        "kv_tokens": 2048,
        "max_sequences": 8,
        "token_budget": 256,
        **sizes,
    }
    offset = 0 if path else location.offset
    load = LoadModel(path=str(path or location.path), offset=offset, threads=1, **more)
    return LlamaRunner(load)
