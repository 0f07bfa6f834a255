"""`llama3.2:1b` and `llama3.2:3b` as Ollama's registry has them, with generated weights.

Media types, order of the layers, keys of the GGUF and tokens of the template are the real ones; as
there, the file has no Jinja template.  The weights are random, the widths those of `TINY` unless
the real ones are asked for, and the words of the vocabulary those of the bundled model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tests.support.gguf_files import (
    ARRAY,
    STRING,
    Real,
    aligned,
    array,
    header,
    key,
    text,
    u32,
    word,
)

PREFIX = "application/vnd.ollama.image."
# What Ollama shows of the template in its own language, which a box does not interpret.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
    "{{ if .System }}{{ .System }}{{ end }}<|eot_id|>\n{{- range $i, $_ := .Messages }}"
    "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
)
LICENSE = (
    "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"
)
POLICY = "**Llama 3.2** **Acceptable Use Policy**\n"
STOP = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_FLOAT, _I32 = 6, 5  # types of keys
_F32, _Q8_0 = 0, 8  # of tensors
_BLOCK = 32
_CONTROL, _NORMAL = 3, 1  # kinds of tokens
_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>",
            "<|end_of_text|>")  # fmt: skip
_SCALE = 0.0005  # of a block: weights of at most 0.06


@dataclass(frozen=True)
class Llama32:
    """`words` are how many the vocabulary has."""

    tag: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    words: int
    type: str
    file_type: int

    def tiny(self) -> Llama32:
        return replace(
            self, layers=2, width=64, feed_forward=128, heads=4, kv_heads=2, head=16, words=4000
        )

    def narrow(self) -> Llama32:
        """The smallest whose rows are multiples of 256, so that all matrices can be K-quants."""
        return replace(
            self, layers=3, width=256, feed_forward=512, heads=4, kv_heads=2, head=64, words=4000
        )

    def weights(self, seed: int = 32) -> bytes:
        """The GGUF."""
        draw = np.random.default_rng(seed)
        entries, data = [], bytearray()
        for name, shape in self._tensors():
            kind = _F32 if len(shape) == 1 else _Q8_0
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            entries.append(text(name) + dimensions + struct.pack("<IQ", kind, len(data)))
            data += aligned(_ones(shape[0]) if kind == _F32 else _blocks(draw, shape))
        return aligned(header(list(self._keys()), entries)) + bytes(data)

    def layer_list(self, weights: bytes) -> list[tuple[str, bytes]]:
        """Media types and contents, in the registry's order."""
        params = json.dumps({"stop": STOP}, indent=4)
        return [
            (f"{PREFIX}model", weights),
            (f"{PREFIX}template", TEMPLATE.encode()),
            (f"{PREFIX}license", LICENSE.encode()),
            (f"{PREFIX}license", POLICY.encode()),
            (f"{PREFIX}params", params.encode()),
        ]

    def configuration(self) -> bytes:
        described = {
            "model_format": "gguf",
            "model_family": "llama",
            "model_families": ["llama"],
            "model_type": self.type,
            "file_type": {7: "Q8_0", 15: "Q4_K_M"}[self.file_type],
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": []},
        }
        return json.dumps(described).encode()

    def _keys(self) -> Iterator[bytes]:
        yield word("general.architecture", "llama")
        yield word("general.basename", "Llama-3.2")
        yield u32("general.file_type", self.file_type)
        yield word("general.finetune", "Instruct")
        yield u32("general.quantization_version", 2)
        yield word("general.size_label", self.tag.upper())
        yield word("general.type", "model")
        numbers = {
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "block_count": self.layers,
            "context_length": 131_072,
            "embedding_length": self.width,
            "feed_forward_length": self.feed_forward,
            "rope.dimension_count": self.head,
            "vocab_size": self.words,
        }
        for name, value in numbers.items():
            yield u32(f"llama.{name}", value)
        for name, number in (("attention.layer_norm_rms_epsilon", 1e-5), ("rope.freq_base", 5e5)):
            yield key(f"llama.{name}", _FLOAT, struct.pack("<f", number))
        yield from self._tokenizer()

    def _tokenizer(self) -> Iterator[bytes]:
        tokens, merges = _vocabulary(self.words)
        kinds = [_CONTROL] * 17 + [_NORMAL] * (self.words - 17)
        yield u32("tokenizer.ggml.bos_token_id", _SPECIAL.index("<|begin_of_text|>"))
        yield u32("tokenizer.ggml.eos_token_id", _SPECIAL.index("<|eot_id|>"))
        yield _strings("tokenizer.ggml.merges", merges)
        yield word("tokenizer.ggml.model", "gpt2")
        yield word("tokenizer.ggml.pre", "llama-bpe")
        packed = struct.pack(f"<{len(kinds)}i", *kinds)
        yield array("tokenizer.ggml.token_type", _I32, len(kinds), packed)
        yield _strings("tokenizer.ggml.tokens", tokens)

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes; the output is computed with the token embeddings."""
        width, wide, narrow = self.width, self.heads * self.head, self.kv_heads * self.head
        yield "token_embd.weight", (width, self.words)
        yield "rope_freqs.weight", (self.head // 2,)
        yield "output_norm.weight", (width,)
        for layer in range(self.layers):
            at = f"blk.{layer}"
            yield f"{at}.attn_norm.weight", (width,)
            yield f"{at}.attn_q.weight", (width, wide)
            yield f"{at}.attn_k.weight", (width, narrow)
            yield f"{at}.attn_v.weight", (width, narrow)
            yield f"{at}.attn_output.weight", (wide, width)
            yield f"{at}.ffn_norm.weight", (width,)
            yield f"{at}.ffn_gate.weight", (width, self.feed_forward)
            yield f"{at}.ffn_up.weight", (width, self.feed_forward)
            yield f"{at}.ffn_down.weight", (self.feed_forward, width)


# The sizes of the real ones.
REAL = {
    "1b": Llama32("1b", 16, 2048, 8192, 32, 8, 64, 128_256, "1.2B", 7),
    "3b": Llama32("3b", 28, 3072, 8192, 24, 8, 128, 128_256, "3.2B", 15),
}
TINY = {tag: model.tiny() for tag, model in REAL.items()}


class _Vocabulary(NamedTuple):
    tokens: list[bytes]
    merges: list[bytes]


def _vocabulary(count: int) -> _Vocabulary:
    """The bundled model's first words, then made-up ones."""
    found = {_name(key): key for key in Real.read().keys}
    tokens = _texts(found["tokenizer.ggml.tokens"])[:count]
    tokens[: len(_SPECIAL)] = [name.encode() for name in _SPECIAL]
    tokens += [f"filler{number}".encode() for number in range(count - len(tokens))]
    known = set(tokens)
    merges = [
        merge
        for merge in _texts(found["tokenizer.ggml.merges"])
        if merge.replace(b" ", b"", 1) in known
    ]
    return _Vocabulary(tokens, merges)


def _name(entry: bytes) -> str:
    (length,) = struct.unpack_from("<Q", entry)
    return entry[8 : 8 + length].decode()


def _texts(entry: bytes) -> list[bytes]:
    """The strings of a key that is an array of them."""
    (length,) = struct.unpack_from("<Q", entry)
    at = 8 + length
    kind, inner, count = struct.unpack_from("<IIQ", entry, at)
    assert (kind, inner) == (ARRAY, STRING)
    at += 16
    found = []
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", entry, at)
        found.append(entry[at + 8 : at + 8 + size])
        at += 8 + size
    return found


def _strings(name: str, values: Sequence[bytes]) -> bytes:
    return array(name, STRING, len(values), b"".join(map(text, values)))


def _ones(size: int) -> bytes:
    return np.ones(size, np.float32).tobytes()


def _blocks(draw: np.random.Generator, shape: tuple[int, ...]) -> bytes:
    """Random numbers as Q8_0."""
    blocks = np.empty(int(np.prod(shape)) // _BLOCK, [("scale", "<f2"), ("values", "i1", _BLOCK)])
    blocks["scale"] = _SCALE
    blocks["values"] = draw.integers(-127, 128, (len(blocks), _BLOCK), np.int8)
    return blocks.tobytes()
