"""What each layer of a model remembers of a sequence, from the metadata of its header.

This follows llama.cpp (`llama_hparams`, `llama_model::create_memory`): attention layers have keys
and values in each cell of the KV cache; recurrent layers (Mamba, RWKV, linear attention) have a
state for each sequence; some have none, since they use another layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct

Scalar = int | float | bool | str
Numbers = tuple[int, ...]  # of an array with a number for each layer
Metadata = Mapping[str, Scalar | Numbers]

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_NUMBER = 2**31 - 1
_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
# Hybrid models: in these, layers without KV heads are recurrent ...
_WITHOUT_HEADS = {
    "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3", "bailingmoe3",
    "glm5-next", "nemotron_h", "nemotron_h_moe",
}  # fmt: skip
# ... in these, all but every n-th ...
_INTERVALS = {"qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"}
_FEED_FORWARD_ONLY = {"nemotron_h", "nemotron_h_moe"}  # so are some layers
_BOTH = {"falcon-h1"}  # ... and in these every layer is of both kinds.
_NONE = {
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
    "jina-bert-v3", "eurobert", "wavtokenizer-dec", "gemma-embedding", "dream", "llada",
    "llada-moe", "rnd1",
}  # fmt: skip
_GEMMA3N_LAYERS = 20  # those after them use the caches of these


class LayerCache(Struct, frozen=True, array_like=True):
    """Numbers of keys and of values in each cell of the KV cache, and of the state of each sequence
    (in single precision)."""

    keys: int = 0
    values: int = 0
    state: int = 0


def layer_caches(architecture: str, metadata: Metadata) -> tuple[LayerCache, ...]:
    """That of each layer; what is not plausible in the metadata counts as absent."""
    model = _Model(architecture, metadata)
    return tuple(model.cache(layer) for layer in range(model.layers))


@dataclass(frozen=True)
class _Model:
    architecture: str
    metadata: Metadata

    @property
    def layers(self) -> int:
        return min(self._number("block_count"), MAX_LAYERS)

    def cache(self, layer: int) -> LayerCache:
        predicted = self._number("nextn_predict_layers")  # layers that only guess further tokens
        if self.architecture in _NONE or (predicted and layer >= self.layers - predicted):
            return LayerCache()
        recurrent = self._is_recurrent(layer)
        if recurrent and self.architecture not in _BOTH:
            return LayerCache(state=self._state())
        state = self._state() if recurrent else 0
        if not self._has_own(layer) or self._is_feed_forward(layer):
            return LayerCache(state=state)
        keys, values = self._widths(layer)
        return LayerCache(keys, values, state)

    def _is_recurrent(self, layer: int) -> bool:
        if self.architecture in _RECURRENT | _BOTH:
            return True
        if self.architecture in _INTERVALS:
            pattern = self.metadata.get(f"{self.architecture}.attention.recurrent_layers")
            if isinstance(pattern, tuple) and len(pattern) == self.layers:
                return bool(pattern[layer])
            return (layer + 1) % max(1, self._number("full_attention_interval", 4)) != 0
        return (
            self.architecture in _WITHOUT_HEADS
            and self._kv_heads(layer) == 0
            and not self._is_feed_forward(layer)
        )

    def _is_feed_forward(self, layer: int) -> bool:
        width = self._of_layer("feed_forward_length", layer, 0)
        return self.architecture in _FEED_FORWARD_ONLY and width > 0

    def _has_own(self, layer: int) -> bool:
        shared = self._number("attention.shared_kv_layers")
        if self.architecture == "gemma3n":
            return layer < _GEMMA3N_LAYERS
        return layer < self.layers - shared

    def _widths(self, layer: int) -> tuple[int, int]:
        """Of keys and of values."""
        heads = self._of_layer("attention.head_count", 0, 0)
        usual = self._number("embedding_length") // max(1, heads)
        key = self._number("attention.key_length", usual)
        value = self._number("attention.value_length", usual)
        if self._has_window(layer):
            key = self._number("attention.key_length_swa", key)
            value = self._number("attention.value_length_swa", value)
        if self._number("attention.key_length_mla"):  # the values are computed from the keys
            value = 0
        kv_heads = self._kv_heads(layer)
        return kv_heads * key, kv_heads * value

    def _has_window(self, layer: int) -> bool:
        return self._of_layer("attention.sliding_window_pattern", layer, 0, scalar=False) != 0

    def _kv_heads(self, layer: int) -> int:
        heads = self._of_layer("attention.head_count", layer, 0)
        return self._of_layer("attention.head_count_kv", layer, heads)

    def _state(self) -> int:
        """Of convolutions and of the recurrence itself."""
        embedding, convolution = self._number("embedding_length"), self._number("ssm.conv_kernel")
        if size := self._number("wkv.head_size"):
            return embedding * (self._number("token_shift_count", 2) + size)
        if length := self._number("shortconv.l_cache"):
            return embedding * (length - 1)
        heads = self._of_layer("attention.head_count", 0, 0)
        if size := self._number("kda.head_dim"):
            return (3 * (convolution - 1 if convolution else 3) + size) * heads * size
        if self.architecture == "minimax-01":
            return heads * self._number("attention.key_length", embedding // max(1, heads)) ** 2
        inner, state = self._number("ssm.inner_size"), self._number("ssm.state_size")
        groups = self._number("ssm.group_count")
        return max(0, convolution - 1) * (inner + 2 * groups * state) + state * inner

    def _number(self, key: str, default: int = 0) -> int:
        return self._of_layer(key, 0, default)

    def _of_layer(self, key: str, layer: int, default: int, *, scalar: bool = True) -> int:
        """The number of the layer, from an array or one for all."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple):
            value = value[layer] if layer < len(value) else None
        elif not scalar:
            value = None
        if isinstance(value, int) and 0 <= value <= _MAX_NUMBER:
            return int(value)
        return default
