"""Tiny models that see images: random weights, the vocabulary of the bundled model, and a projector
for each of the ways in which llama.cpp computes images.

* `llava`: an image is so many tokens, one after another.
* `gemma3`: each cell of an image attends to all of its cells.
* `qwen2vl`: positions have several dimensions, and an image takes fewer than it has cells.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.gguf_files import Real, aligned, array, header, key, text, u32, word

Family = Literal["llava", "gemma3", "qwen2vl"]
FAMILIES: tuple[Family, ...] = ("llava", "gemma3", "qwen2vl")
_F32, _F16 = 0, 1  # of tensors
_BOOL, _FLOAT, _I32 = 7, 6, 5  # of keys
_SIZE, _HEADS, _FEED, _LAYERS, _VOCAB = 64, 4, 128, 2, 49152
_EYE = 32  # the size of the projectors' hidden states
_IMAGE, _PATCH = 64, 8

Tensors = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.float16]]


class VisionFiles(NamedTuple):
    model: Path
    projector: Path


def put(folder: Path, family: Family = "llava", name: str = "tiny") -> VisionFiles:
    """Write a model and its projector, whose name says that it is the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    files = VisionFiles(folder / f"{name}.gguf", folder / f"mmproj-{name}.gguf")
    files.model.write_bytes(_model(family))
    files.projector.write_bytes(_projector(family))
    return files


def image(red: int = 0, green: int = 0, blue: int = 0, size: tuple[int, int] = (80, 60)) -> bytes:
    """A PNG file of one colour, with a white stripe."""
    made = Image.new("RGB", size, (red, green, blue))
    made.paste((255, 255, 255), (0, 0, size[0] // 4, size[1]))
    return encoded(made, "PNG")


def encoded(made: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    made.save(file, kind, **options)
    return file.getvalue()


# -- files -----------------------------------------------------------------------------------------


def _f32(name: str, value: float) -> bytes:
    return key(name, _FLOAT, struct.pack("<f", value))


def _flag(name: str) -> bytes:
    return key(name, _BOOL, b"\1")


def _floats(name: str, *values: float) -> bytes:
    return array(name, _FLOAT, len(values), struct.pack(f"<{len(values)}f", *values))


def _written(keys: Sequence[bytes], tensors: Tensors) -> bytes:
    entries, data = [], bytearray()
    for name, values in tensors.items():
        shape = values.shape[::-1]
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        kind = _F16 if values.dtype == np.float16 else _F32
        entries.append(text(name) + dimensions + struct.pack("<IQ", kind, len(data)))
        data += aligned(values.tobytes())
    return aligned(header(keys, entries)) + bytes(data)


@cache
def _tokenizer() -> tuple[bytes, ...]:
    return tuple(each for each in Real.read().keys if each[8:18] == b"tokenizer.")


class _Weights:
    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.tensors: Tensors = {}

    def add(self, name: str, *shape: int, scale: float = 0.2) -> None:
        self.tensors[name] = self._random.normal(0, scale, shape).astype(np.float32)

    def ones(self, *names: str, size: int) -> None:
        for name in names:
            self.tensors[name] = np.ones(size, np.float32)

    def zeros(self, *names: str, size: int) -> None:
        for name in names:
            self.tensors[name] = np.zeros(size, np.float32)


def _model(family: Family) -> bytes:
    name = "llama" if family == "llava" else family
    head = _SIZE // _HEADS
    keys = [
        word("general.architecture", name),
        u32(f"{name}.context_length", 4096),
        u32(f"{name}.embedding_length", _SIZE),
        u32(f"{name}.block_count", _LAYERS),
        u32(f"{name}.feed_forward_length", _FEED),
        u32(f"{name}.attention.head_count", _HEADS),
        u32(f"{name}.attention.head_count_kv", _HEADS),
        u32(f"{name}.attention.key_length", head),
        u32(f"{name}.attention.value_length", head),
        u32(f"{name}.rope.dimension_count", head),
        _f32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5),
    ]
    if family == "qwen2vl":
        sections = struct.pack("<4i", 2, 3, 3, 0)
        keys.append(array(f"{name}.rope.dimension_sections", _I32, 4, sections))
    weights = _Weights(1)
    # What is only looked up may be small; products with F16 would round so much that a draw could
    # depend on what else is in a batch.
    weights.add("token_embd.weight", _VOCAB, _SIZE, scale=1.0)
    weights.tensors["token_embd.weight"] = weights.tensors["token_embd.weight"].astype(np.float16)
    weights.add("output.weight", _VOCAB, _SIZE, scale=1.0)
    weights.ones("output_norm.weight", size=_SIZE)
    for layer in range(_LAYERS):
        at = f"blk.{layer}"
        weights.ones(f"{at}.attn_norm.weight", f"{at}.ffn_norm.weight", size=_SIZE)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights.add(f"{at}.{part}.weight", _SIZE, _SIZE)
        if family == "qwen2vl":
            weights.zeros(*(f"{at}.attn_{part}.bias" for part in "qkv"), size=_SIZE)
        if family == "gemma3":
            norms = ("post_attention_norm", "post_ffw_norm")
            weights.ones(*(f"{at}.{norm}.weight" for norm in norms), size=_SIZE)
            weights.ones(f"{at}.attn_q_norm.weight", f"{at}.attn_k_norm.weight", size=head)
        weights.add(f"{at}.ffn_gate.weight", _FEED, _SIZE)
        weights.add(f"{at}.ffn_up.weight", _FEED, _SIZE)
        weights.add(f"{at}.ffn_down.weight", _SIZE, _FEED)
    return _written([*keys, *_tokenizer()], weights.tensors)


def _projector(family: Family) -> bytes:
    kind = {"llava": "mlp", "gemma3": "gemma3", "qwen2vl": "qwen2vl_merger"}[family]
    keys = [
        word("general.architecture", "clip"),
        _flag("clip.has_vision_encoder"),
        _flag("clip.use_gelu"),
        word("clip.projector_type", kind),
        u32("clip.vision.image_size", _IMAGE),
        u32("clip.vision.patch_size", _PATCH),
        u32("clip.vision.embedding_length", _EYE),
        u32("clip.vision.feed_forward_length", 2 * _EYE),
        u32("clip.vision.block_count", 1),
        u32("clip.vision.projection_dim", _SIZE),
        u32("clip.vision.attention.head_count", 2),
        u32("clip.vision.projector.scale_factor", 2),
        _f32("clip.vision.attention.layer_norm_epsilon", 1e-5),
        _floats("clip.vision.image_mean", 0.5, 0.5, 0.5),
        _floats("clip.vision.image_std", 0.5, 0.5, 0.5),
    ]
    weights = _Weights(2)
    weights.add("v.patch_embd.weight", _EYE, 3, _PATCH, _PATCH)
    if family == "qwen2vl":
        weights.add("v.patch_embd.weight.1", _EYE, 3, _PATCH, _PATCH)
    else:
        weights.add("v.position_embd.weight", (_IMAGE // _PATCH) ** 2, _EYE)
    for part in ("q", "k", "v", "out"):
        weights.add(f"v.blk.0.attn_{part}.weight", _EYE, _EYE)
        weights.zeros(f"v.blk.0.attn_{part}.bias", size=_EYE)
    for norm in ("v.blk.0.ln1", "v.blk.0.ln2", "v.post_ln"):
        weights.ones(f"{norm}.weight", size=_EYE)
        weights.zeros(f"{norm}.bias", size=_EYE)
    weights.add("v.blk.0.ffn_up.weight", 2 * _EYE, _EYE)
    weights.add("v.blk.0.ffn_down.weight", _EYE, 2 * _EYE)
    match family:
        case "llava":
            weights.add("mm.0.weight", _SIZE, _EYE)
            weights.zeros("mm.0.bias", "mm.2.bias", size=_SIZE)
            weights.add("mm.2.weight", _SIZE, _SIZE)
        case "gemma3":
            weights.add("mm.input_projection.weight", _EYE, _SIZE, scale=2.0)
            weights.ones("mm.soft_emb_norm.weight", size=_EYE)
        case "qwen2vl":
            weights.add("mm.0.weight", 4 * _EYE, 4 * _EYE)
            weights.zeros("mm.0.bias", size=4 * _EYE)
            weights.add("mm.2.weight", _SIZE, 4 * _EYE)
            weights.zeros("mm.2.bias", size=_SIZE)
    return _written(keys, weights.tensors)
