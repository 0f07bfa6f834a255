"""LoRA adapters: loaded beside a model, and added to what its contexts compute."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine.llama_log import LlamaLog
from pinaivu_box.engine.messages import Adapter
from pinaivu_box.errors import BoxError


class LoadedAdapters:
    """To be made before the model's contexts, whose graphs have to have room for them; they are
    freed with the model.  Raises BoxError for one that does not fit it."""

    def __init__(
        self, model: llama.llama_model_p, adapters: Sequence[Adapter], log: LlamaLog
    ) -> None:
        self._count = len(adapters)
        self._loaded = (llama.llama_adapter_lora_p_ctypes * self._count)(
            *(_load(model, adapter, log) for adapter in adapters)
        )
        self._scales = (ctypes.c_float * self._count)(*(adapter.scale for adapter in adapters))

    def apply(self, context: llama.llama_context_p) -> None:
        """For all that the context computes from now on."""
        if self._count:
            llama.llama_set_adapters_lora(context, self._loaded, self._count, self._scales)


def _load(
    model: llama.llama_model_p, adapter: Adapter, log: LlamaLog
) -> llama.llama_adapter_lora_p:
    name = Path(adapter.path).name
    loaded = llama.llama_adapter_lora_init(model, os.fsencode(adapter.path))
    if not loaded:
        raise BoxError(
            f"the adapter {name} does not fit the model: {log.last or 'no reason given'}"
        )
    if llama.llama_adapter_get_alora_n_invocation_tokens(loaded):
        raise BoxError(
            f"the adapter {name} is an activated one (aLoRA), which is for a part of a prompt "
            "only: use a plain LoRA"
        )
    return loaded
