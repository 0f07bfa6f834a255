"""What a model would take, from llama.cpp itself: everything is set up as for loading, but neither
weights nor cache are allocated."""

from __future__ import annotations

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import LoadModel, Probed


def probe(load: LoadModel) -> Probed:
    """Raises BoxError, as loading would."""
    runner = LlamaRunner(load, simulate=True)
    return Probed(
        weights=llama.llama_model_size(runner.model),
        cache=runner.log.cache_size,
        compute={each.device: each.compute for each in runner.memory if each.compute},
    )
