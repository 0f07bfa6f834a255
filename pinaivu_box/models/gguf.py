"""The facts in a GGUF file's header, read without llama.cpp (which the parent never loads).

Format: ggml/docs/gguf.md.  A file is hostile until it is read: whatever its counts and lengths say,
reading is bounded (`gguf_bytes`), and only the values that the box needs are kept.  Arrays
(vocabularies, merges) are passed over, but for those that have a number for each layer.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pinaivu_box.models.gguf_bytes import INCOMPLETE, NO_ROOM, BadGguf, GgufBytes
from pinaivu_box.models.layer_caches import (
    MAX_LAYERS,
    LayerCache,
    Numbers,
    Scalar,
    layer_caches,
)
from pinaivu_box.models.names import printable
from pinaivu_box.models.regular_files import open_regular

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f",
    7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_WHOLE_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 10, 11)  # types; booleans count as 0 and 1
_MAX_KEYS = 65_536
_MAX_TENSORS = 131_072
_EMPTY = "it is empty"
BEING_WRITTEN = "it was written to a moment ago"
_MAX_INT = 2**31 - 1
_MAX_COUNT = 2**62
# ggml_type -> elements in a block, and its bytes.  What is not here may be of a newer llama.cpp.
TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


# llama_ftype (llama.h) -> how most of the weights are quantised.
_QUANTISATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
_ENCODER_TENSORS = ("v.", "mm.")  # beginnings of names, as in llama.cpp's mtmd
_PLACED_PROJECTORS = ("hunyuanvl", "deepseek4v")
_PROJECTOR = "it is a projector for images (mmproj), which is no model by itself"
_ENCODER = (
    "it holds an encoder for images beside the model, which llama.cpp reads from a file of its "
    "own: pull the model from the Hub (hf.co/OWNER/REPO), where the two are apart"
)
_BYTES = ("input_bytes", "output_bytes", "embedding_bytes")  # of headers
_TEMPLATE = "tokenizer.chat_template"
_EXPERTS = "_exps."  # in names of tensors: ffn_gate_exps.weight
_BLOCK = re.compile(r"blk\.([0-9]{1,4})\.")  # beginning of the names of a layer's tensors
_TOKEN_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
# Beginnings of the names of what llama.cpp keeps in the machine's memory, before the first layer.
_INPUT_TENSORS = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
# What `layer_caches` computes with, and how large it may be.
_SIZES = {
    "block_count": 65_536,
    "attention.head_count": 65_536,
    "attention.head_count_kv": 65_536,
    "attention.key_length": 2**24,
    "attention.value_length": 2**24,
}
_OTHER_KIND = "it holds no model but "


class Header(Struct, frozen=True):
    """What the box needs to know of a file.

    A file that is part of a model
    says that it is number `part` (from 1) of `parts` with `all_tensors` in all; otherwise those are
    0.  `parameters` counts the numbers in its tensors, `expert_parameters` those of experts, of
    which a token uses `experts_used` of `experts`; with `has_encoder` some read images.  With
    `has_template` it says how a chat is written.  `projector` is the kind of a projector for
    images, `adapter` that of an adapter, "lora".

    For memory (see `fit`): bytes of the tensors of each layer, of those before and after them, and
    of the token embeddings, with which the output is computed unless it has a tensor of its own;
    what each layer caches; and the widths that buffers for computing depend on.
    """

    architecture: str = ""
    kind: str = "model"
    context_length: int = 2048
    tensors: int = 0
    part: int = 0
    parts: int = 0
    all_tensors: int = 0
    parameters: int = 0
    expert_parameters: int = 0
    experts: int = 0
    experts_used: int = 0
    has_encoder: bool = False
    quantisation: str = ""
    adapter: str = ""
    layer_bytes: Numbers = ()
    input_bytes: int = 0
    output_bytes: int = 0
    embedding_bytes: int = 0
    has_output: bool = False
    caches: tuple[LayerCache, ...] = ()
    vocabulary: int = 0
    embedding: int = 0
    feed_forward: int = 0
    has_windows: bool = False  # in the attention of some layers
    has_template: bool = False
    license: str = ""
    projector: str = ""

    @property
    def tied_output(self) -> bool:
        """Whether the output is computed with the token embeddings."""
        return self.embedding_bytes > 0 and not self.has_output

    @property
    def active_parameters(self) -> int:
        """How many parameters a token uses."""
        if not 0 < self.experts_used <= self.experts:
            return self.parameters
        idle = self.expert_parameters * (self.experts - self.experts_used) // self.experts
        return self.parameters - idle


def read_header(path: Path, offset: int = 0, size: int | None = None) -> Header:
    """The header of the GGUF that is `size` bytes at `offset` of the file, or all from there on.

    It takes seconds if the file was made for that.  Raises BadGguf, also if the file ends before
    its last tensor does, and OSError.
    """
    with open_regular(path, buffering=0) as file:
        rest = file.seek(0, 2) - offset
        return _read(GgufBytes(file, offset, rest if size is None else min(size, rest)))


def joined(headers: Sequence[Header]) -> Header:
    """The header of a model in several files: that of the first, with the tensors of all."""
    layers = zip_longest(*(each.layer_bytes for each in headers), fillvalue=0)
    sums = {
        name: sum(getattr(each, name) for each in headers)
        for name in ("parameters", "expert_parameters", *_BYTES)
    }
    return replace(
        headers[0],
        layer_bytes=tuple(map(sum, layers)),
        has_output=any(each.has_output for each in headers),
        vocabulary=max(each.vocabulary for each in headers),
        **sums,
    )


def check_whole(header: Header, tensors: int) -> None:
    """Whether a file, or the first part of several with so many tensors in all, begins a model.
    Raises BadGguf."""
    if header.kind != "model":
        raise BadGguf(f"{_OTHER_KIND}{printable(header.kind)} (its general.type)")
    if not header.architecture:
        raise BadGguf("it does not name its architecture (general.architecture)")
    if header.architecture == "clip":
        raise BadGguf(_PROJECTOR)
    if header.has_encoder:
        raise BadGguf(_ENCODER)
    if tensors == 0:
        raise BadGguf("it has no tensors")


def check_adapter(header: Header, architecture: str) -> None:
    """Whether a file is a LoRA adapter for models of that architecture.  Raises BadGguf."""
    if header.kind != "adapter":
        raise BadGguf(f"it is no adapter but {printable(header.kind)} (its general.type)")
    if header.adapter != "lora":
        kind = printable(header.adapter) or "unknown"
        raise BadGguf(f"it is an adapter of the kind {kind}, not a LoRA (its adapter.type)")
    if header.architecture != architecture:
        raise BadGguf(
            f"it is for {printable(header.architecture)} models (its general.architecture), and "
            f"this one is {printable(architecture)}"
        )
    if header.tensors == 0:
        raise BadGguf("it has no tensors")


def check_projector(header: Header) -> None:
    """Whether a file is a projector for images that this box can use.  Raises BadGguf."""
    if header.architecture != "clip" or not header.projector:
        raise BadGguf("it is no projector for images (mmproj)")
    if header.projector in _PLACED_PROJECTORS:
        raise BadGguf(
            f"its images ({header.projector}) depend on where in the prompt they are, which this "
            "box does not support"
        )


def is_no_model(why: str) -> bool:
    """Whether a file is not served because it is something else than a model, not because there is
    something wrong with it."""
    return why.startswith((_PROJECTOR, _OTHER_KIND))


def is_unfinished(why: str) -> bool:
    """Whether a file that is not served may be served once more of it was written."""
    return INCOMPLETE in why or why == _EMPTY or why.endswith((NO_ROOM, BEING_WRITTEN))


def _read(file: GgufBytes) -> Header:
    if file.size == 0:
        raise BadGguf(_EMPTY)
    if file.size < 4 or file.take(4) != b"GGUF":
        raise BadGguf("it does not begin with the letters GGUF")
    version = file.number("<I")
    if version >= 2**24 and version % 2**24 == 0:
        raise BadGguf("it was written for big-endian machines")
    if version not in (2, 3):
        raise BadGguf(f"it is of GGUF version {version}; 2 and 3 are known")
    tensors, keys = file.number("<Q"), file.number("<Q")
    if keys > _MAX_KEYS:
        raise BadGguf(f"its header claims {keys} keys")
    if tensors > _MAX_TENSORS:
        raise BadGguf(f"its header claims {tensors} tensors")
    metadata = _metadata(file, keys)
    values = _Values({key: value for key, value in metadata.items() if value is not None})
    read = _read_tensors(file, tensors, values.alignment())
    if read.end > file.size:
        raise BadGguf(
            f"{INCOMPLETE}: it has {file.size:,} bytes, and its tensors end at {read.end:,}"
        )
    return replace(
        values.header(tensors),
        parameters=min(read.parameters, _MAX_COUNT),
        expert_parameters=min(read.expert_parameters, _MAX_COUNT),
        has_encoder=read.has_encoder,
        layer_bytes=tuple(read.layers),
        input_bytes=read.input,
        output_bytes=read.output,
        embedding_bytes=read.embeddings,
        has_output=read.has_output,
        vocabulary=min(read.vocabulary, _MAX_COUNT),
        has_template=_TEMPLATE in metadata,
    )


def _metadata(file: GgufBytes, count: int) -> dict[str, Scalar | Numbers | None]:
    """Values by key; None for those that the box does not need."""
    metadata: dict[str, Scalar | Numbers | None] = {}
    for _ in range(count):
        file.step()
        key = file.name()
        if key in metadata:
            raise BadGguf(f"it has the key {printable(key, 80)} twice")
        metadata[key] = _value(file, file.number("<I"))
    return metadata


def _value(file: GgufBytes, kind: int) -> Scalar | Numbers | None:
    if kind == _STRING:
        return file.text()
    if kind == _ARRAY:
        return _array(file)
    return file.scalar(_form(kind))


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise BadGguf(f"it has a value of the unknown type {kind}")
    return _SCALARS[kind]


def _array(file: GgufBytes) -> Numbers | None:
    """Its values if they can be numbers of the layers; else it is passed over."""
    kind, count = file.number("<I"), file.number("<Q")
    if kind == _STRING:
        file.skip_strings(count)
        return None
    if kind == _ARRAY:
        raise BadGguf("it has an array of arrays, which llama.cpp does not read")
    size = struct.calcsize(_form(kind)) * count
    if size > file.size - file.at:
        raise BadGguf(f"it has an array of {count} values, {NO_ROOM}")
    if kind in _WHOLE_NUMBERS and count <= MAX_LAYERS:
        return tuple(file.number(_form(kind)) for _ in range(count))
    file.skip(size)
    return None


@dataclass
class _Tensors:
    """Sums over the tensors: where the last one ends in the file, and see `Header`."""

    end: int = 0
    parameters: int = 0
    expert_parameters: int = 0
    has_encoder: bool = False
    layers: list[int] = field(default_factory=list)  # bytes, as the next ones
    input: int = 0
    output: int = 0
    embeddings: int = 0
    has_output: bool = False
    vocabulary: int = 0

    def add(self, name: str, shape: Sequence[int], size: int) -> None:
        """Count a tensor of so many bytes."""
        elements = math.prod(shape)
        self.parameters += elements
        self.expert_parameters += elements if _EXPERTS in name else 0
        self.has_encoder = self.has_encoder or name.startswith(_ENCODER_TENSORS)
        block = _BLOCK.match(name)
        if block is not None and int(block[1]) < MAX_LAYERS:
            self.layers += [0] * (int(block[1]) + 1 - len(self.layers))
            self.layers[int(block[1])] += size
        elif name.startswith(_INPUT_TENSORS):
            self.input += size
        else:
            self.output += size
        if name == _TOKEN_EMBEDDINGS:
            self.embeddings, self.vocabulary = size, shape[1] if len(shape) > 1 else 0


def _read_tensors(file: GgufBytes, count: int, alignment: int) -> _Tensors:
    names: set[str] = set()
    sums, end = _Tensors(), 0
    for _ in range(count):
        file.step()
        name = file.name()
        if name in names:
            raise BadGguf(f"it has the tensor {printable(name, 80)} twice")
        names.add(name)
        dimensions = file.number("<I")
        if dimensions > 4:
            raise BadGguf(f"it has a tensor of {dimensions} dimensions")
        shape = [file.number("<Q") for _ in range(dimensions)]
        kind, offset = file.number("<I"), file.number("<Q")
        block, size = TENSOR_TYPES.get(kind, (1, 0))
        elements = math.prod(shape)
        if max(elements, offset) >= _MAX_COUNT:
            raise BadGguf(f"its tensor {printable(name, 80)} is larger than any file")
        bytes_ = elements // block * size
        end = max(end, offset + bytes_)
        sums.add(name, shape, bytes_)
    sums.has_output = _OUTPUT in names
    begin = -(-file.at // alignment) * alignment
    sums.end = begin + end if count else file.at
    return sums


@dataclass(frozen=True)
class _Values:
    """The metadata; what is not plausible raises BadGguf."""

    metadata: dict[str, Scalar | Numbers]

    def alignment(self) -> int:
        value = self._whole("general.alignment", 32, 1, 2**20)
        if value & (value - 1):
            raise BadGguf(f"its general.alignment is {value}, no power of 2")
        return value

    def header(self, tensors: int) -> Header:
        for key, maximum in _SIZES.items():
            self._of_architecture(key, 0, 0, maximum)
        parts = self._whole("split.count", 0, 0, 65_535)
        return Header(
            architecture=self._text("general.architecture"),
            kind=self._text("general.type") or "model",
            context_length=self._of_architecture("context_length", 2048, 1, _MAX_INT),
            tensors=tensors,
            experts=self._of_architecture("expert_count", 0, 0, 65_536),
            experts_used=self._of_architecture("expert_used_count", 0, 0, 65_536),
            part=self._whole("split.no", 0, 0, 65_535) + 1 if parts else 0,
            parts=parts,
            all_tensors=self._whole("split.tensors.count", 0, 0, _MAX_INT) if parts else 0,
            adapter=self._text("adapter.type"),
            projector=self._text("clip.projector_type") or self._text("clip.vision.projector_type"),
            quantisation=_QUANTISATIONS.get(self._file_type(), ""),
            caches=layer_caches(self._text("general.architecture"), self.metadata),
            embedding=self._of_architecture("embedding_length", 0, 0, 2**24),
            feed_forward=self._of_architecture("feed_forward_length", 0, 0, 2**24),
            has_windows=self._of_architecture("attention.sliding_window", 0, 0, _MAX_INT) > 0,
            license=self._shown("general.license.name") or self._shown("general.license"),
        )

    def _shown(self, key: str) -> str:
        """A text that is for show: none is wrong."""
        value = self.metadata.get(key, "")
        return printable(value, 100).strip() if isinstance(value, str) else ""

    def _file_type(self) -> int:
        value = self.metadata.get("general.file_type", -1)
        return value if isinstance(value, int) else -1  # it is for show: none is wrong

    def _of_architecture(self, key: str, default: int, minimum: int, maximum: int) -> int:
        """`context_length` of `llama.context_length`, say."""
        return self._whole(f"{self._text('general.architecture')}.{key}", default, minimum, maximum)

    def _whole(self, key: str, default: int, minimum: int, maximum: int) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, tuple):  # one for each layer
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            text = printable(repr(value), 40)
            bounds = f"a whole number from {minimum} to {maximum}"
            raise BadGguf(f"its {printable(key, 80)} is {text}, not {bounds}")
        return value

    def _text(self, key: str) -> str:
        value = self.metadata.get(key, "")
        if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            raise BadGguf(f"its {key} is {printable(repr(value), 40)}, not a word")
        return value
