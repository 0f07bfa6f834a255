"""GGUF files in the shapes of known models, without their weights: a header, and a hole where the
tensors would be.  llama.cpp reads them as any other, as long as nobody computes with them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pinaivu_box.models.gguf import TENSOR_TYPES
from tests.support import gguf_files

F32, F16, Q8_0, Q4_K, Q6_K = 0, 1, 8, 12, 14  # ggml_type
_U32, _FLOAT = 4, 6
Tensor = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class Shape:
    """`numbers` are further keys of the architecture; a tuple is one number for each layer."""

    name: str
    architecture: str
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int | tuple[int, ...]
    head: int
    vocabulary: int
    tied: bool = False
    numbers: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    weights: int = Q4_K
    embeddings: int = Q6_K

    def write(self, folder: Path) -> Path:
        """The file; it takes next to no space on the disk."""
        path = folder / f"{self.name}.gguf"
        entries, offset = [], 0
        for name, dimensions, kind in self.tensors():
            block, size = TENSOR_TYPES[kind]
            entry = gguf_files.text(name) + struct.pack("<I", len(dimensions))
            entry += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
            entries.append(entry)
            bytes_ = math.prod(dimensions) // block * size
            offset += -(-bytes_ // gguf_files.ALIGNMENT) * gguf_files.ALIGNMENT
        head = gguf_files.aligned(gguf_files.header(list(self.keys()), entries))
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + offset)
        return path

    def keys(self) -> Iterator[bytes]:
        yield gguf_files.word("general.architecture", self.architecture)
        yield gguf_files.word("tokenizer.ggml.model", "no_vocab")
        numbers: dict[str, int | tuple[int, ...]] = {
            "vocab_size": self.vocabulary,
            "context_length": 131_072,
            "embedding_length": self.embedding,
            "block_count": self.layers,
            "feed_forward_length": self.feed_forward,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "rope.dimension_count": self.head,
        }
        for name, value in (numbers | self.numbers).items():
            yield self._key(name, value)
        epsilon = struct.pack("<f", 1e-5)
        name = f"{self.architecture}.attention.layer_norm_rms_epsilon"
        yield gguf_files.key(name, _FLOAT, epsilon)

    def _key(self, name: str, value: int | Sequence[int]) -> bytes:
        name = f"{self.architecture}.{name}"
        if isinstance(value, int):
            return gguf_files.u32(name, value)
        return gguf_files.array(name, _U32, len(value), struct.pack(f"<{len(value)}I", *value))

    def tensors(self) -> Iterator[Tensor]:
        yield "token_embd.weight", (self.embedding, self.vocabulary), self.embeddings
        if not self.tied:
            yield "output.weight", (self.embedding, self.vocabulary), self.embeddings
        norm = "token_embd_norm.weight" if self.architecture == "lfm2" else "output_norm.weight"
        yield norm, (self.embedding,), F32
        for layer in range(self.layers):
            for name, dimensions, kind in self._layer(layer):
                yield f"blk.{layer}.{name}", dimensions, kind

    def _layer(self, layer: int) -> Iterator[Tensor]:
        if self.architecture == "mamba":
            yield from self._mamba()
            return
        yield "attn_norm.weight", (self.embedding,), F32
        yield "ffn_norm.weight", (self.embedding,), F32
        if self.architecture == "deepseek2":
            yield from self._latent_attention()
        elif not self._kv_heads(layer):
            yield from self._convolution()
        else:
            yield from self._attention(layer)
        if "expert_count" in self.numbers and layer >= self._number("leading_dense_block_count"):
            yield from self._experts()
        else:
            yield from self._feed_forward()

    def _attention(self, layer: int) -> Iterator[Tensor]:
        embedding, wide = self.embedding, self.heads * self.head
        narrow = self._kv_heads(layer) * self.head
        yield "attn_q.weight", (embedding, wide), self.weights
        yield "attn_k.weight", (embedding, narrow), self.weights
        yield "attn_v.weight", (embedding, narrow), self.weights
        yield "attn_output.weight", (wide, embedding), self.weights
        if self.architecture in ("qwen3", "qwen3moe", "gemma3", "lfm2"):
            yield "attn_q_norm.weight", (self.head,), F32
            yield "attn_k_norm.weight", (self.head,), F32
        if self.architecture == "gemma3":
            yield "post_attention_norm.weight", (embedding,), F32
            yield "post_ffw_norm.weight", (embedding,), F32

    def _latent_attention(self) -> Iterator[Tensor]:
        rank, rope = self._number("attention.kv_lora_rank"), self._number("rope.dimension_count")
        key = self._number("attention.key_length_mla")
        value = self._number("attention.value_length_mla")
        yield "attn_kv_a_norm.weight", (rank,), F32
        yield "attn_q.weight", (self.embedding, self.heads * key), self.weights
        yield "attn_kv_a_mqa.weight", (self.embedding, rank + rope), self.weights
        yield "attn_k_b.weight", (key - rope, rank, self.heads), Q8_0
        yield "attn_v_b.weight", (rank, value, self.heads), Q8_0
        yield "attn_output.weight", (self.heads * value, self.embedding), self.weights

    def _convolution(self) -> Iterator[Tensor]:
        embedding = self.embedding
        yield "shortconv.conv.weight", (self._number("shortconv.l_cache"), embedding), F32
        yield "shortconv.in_proj.weight", (embedding, 3 * embedding), self.weights
        yield "shortconv.out_proj.weight", (embedding, embedding), self.weights

    def _feed_forward(self) -> Iterator[Tensor]:
        yield "ffn_gate.weight", (self.embedding, self.feed_forward), self.weights
        yield "ffn_up.weight", (self.embedding, self.feed_forward), self.weights
        yield "ffn_down.weight", (self.feed_forward, self.embedding), self.weights

    def _experts(self) -> Iterator[Tensor]:
        count, width = self._number("expert_count"), self._number("expert_feed_forward_length")
        yield "ffn_gate_inp.weight", (self.embedding, count), F32
        yield "ffn_gate_exps.weight", (self.embedding, width, count), self.weights
        yield "ffn_up_exps.weight", (self.embedding, width, count), self.weights
        yield "ffn_down_exps.weight", (width, self.embedding, count), self.embeddings
        if shared := self._number("expert_shared_count") * width:
            yield "ffn_gate_shexp.weight", (self.embedding, shared), self.weights
            yield "ffn_up_shexp.weight", (self.embedding, shared), self.weights
            yield "ffn_down_shexp.weight", (shared, self.embedding), self.weights

    def _mamba(self) -> Iterator[Tensor]:
        inner, state = self._number("ssm.inner_size"), self._number("ssm.state_size")
        rank, kernel = self._number("ssm.time_step_rank"), self._number("ssm.conv_kernel")
        yield "attn_norm.weight", (self.embedding,), F32
        yield "ssm_in.weight", (self.embedding, 2 * inner), self.weights
        yield "ssm_conv1d.weight", (kernel, inner), F32
        yield "ssm_conv1d.bias", (inner,), F32
        yield "ssm_x.weight", (inner, rank + 2 * state), self.weights
        yield "ssm_dt.weight", (rank, inner), F32
        yield "ssm_dt.bias", (inner,), F32
        yield "ssm_a", (state, inner), F32
        yield "ssm_d", (inner,), F32
        yield "ssm_out.weight", (inner, self.embedding), self.weights

    def _kv_heads(self, layer: int) -> int:
        return self.kv_heads if isinstance(self.kv_heads, int) else self.kv_heads[layer]

    def _number(self, name: str) -> int:
        value = self.numbers.get(name, 0)
        assert isinstance(value, int)
        return value


_LFM_HEADS = tuple(8 if layer in (2, 5, 8, 10, 12, 14) else 0 for layer in range(16))
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 4, 256, 512, 4, 2, 64, 2000, tied=True),
        Shape("tiny-window", "gemma3", 6, 256, 512, 4, 2, 64, 2000, tied=True,
              numbers={"attention.sliding_window": 512}),
        Shape("llama-1b", "llama", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True),
        Shape("llama-3b", "llama", 28, 3072, 8192, 24, 8, 128, 128_256, tied=True),
        Shape("llama-8b", "llama", 32, 4096, 14_336, 32, 8, 128, 128_256),
        Shape("llama-70b", "llama", 80, 8192, 28_672, 64, 8, 128, 128_256),
        Shape("qwen3-0.6b", "qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, tied=True),
        Shape("qwen3-32b", "qwen3", 64, 5120, 25_600, 64, 8, 128, 151_936),
        Shape("qwen3-30b-a3b", "qwen3moe", 48, 2048, 6144, 32, 4, 128, 151_936,
              numbers={"expert_count": 128, "expert_used_count": 8,
                       "expert_feed_forward_length": 768}),
        Shape("gemma3-4b", "gemma3", 34, 2560, 10_240, 8, 4, 256, 262_208, tied=True,
              numbers={"attention.sliding_window": 1024}),
        Shape("gemma3-27b", "gemma3", 62, 5376, 21_504, 32, 16, 128, 262_208, tied=True,
              numbers={"attention.sliding_window": 1024}),
        Shape("deepseek2-lite", "deepseek2", 27, 2048, 10_944, 16, 1, 576, 102_400,
              numbers={"attention.value_length": 512, "attention.key_length_mla": 192,
                       "attention.value_length_mla": 128, "attention.kv_lora_rank": 512,
                       "rope.dimension_count": 64, "expert_count": 64, "expert_used_count": 6,
                       "expert_shared_count": 2, "expert_feed_forward_length": 1408,
                       "leading_dense_block_count": 1},
              weights=Q8_0, embeddings=Q8_0),
        Shape("lfm2-1.2b", "lfm2", 16, 2048, 8192, 32, _LFM_HEADS, 64, 65_536, tied=True,
              numbers={"shortconv.l_cache": 3}),
        Shape("mamba-2.8b", "mamba", 64, 2560, 0, 0, 0, 0, 50_280, tied=True,
              numbers={"ssm.inner_size": 5120, "ssm.state_size": 16, "ssm.time_step_rank": 160,
                       "ssm.conv_kernel": 4},
              weights=Q8_0),
    )
}  # fmt: skip
