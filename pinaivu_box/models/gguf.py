"""The facts in a GGUF file's header, read without llama.cpp (which the parent never loads).

Format: ggml/docs/gguf.md.  A file is hostile until it is read: whatever its counts and lengths say,
reading takes at most `_MAX_ITEMS` steps and `_MAX_HEADER_BYTES` of the file, and keeps only the
values that the box needs.  Arrays (vocabularies, merges) are passed over.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from pinaivu_box.models.names import printable
from pinaivu_box.models.regular_files import open_regular

Scalar = int | float | bool | str

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f",
    7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_STRING_BYTES = 16 * 1024 * 1024
_MAX_VALUE_BYTES = 256  # of a string that is kept
_MAX_NAME_BYTES = 4096  # of keys and tensors; the format allows 65,535
_MAX_KEYS = 65_536
_MAX_TENSORS = 131_072
_MAX_ITEMS = 4_000_000  # keys, tensors and strings of arrays; the largest vocabularies have 800,000
_MAX_HEADER_BYTES = 256 * 1024 * 1024
_WINDOW_BYTES = 1024 * 1024
_EMPTY = "it is empty"
_INCOMPLETE = "it is incomplete"
_CUT_OFF = f"{_INCOMPLETE}: it ends in the middle of its header"
_NO_ROOM = "more than the file has room for"
BEING_WRITTEN = "it was written to a moment ago"
_MAX_INT = 2**31 - 1
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
_PROJECTOR = "it is a projector for images (mmproj), which is no model by itself"
_ENCODER = (
    "it holds an encoder for images beside the model, which llama.cpp reads from a file of its "
    "own: pull the model from the Hub (hf.co/OWNER/REPO), where the two are apart"
)
_OTHER_KIND = "it holds no model but "


class BadGguf(ValueError):
    """The bytes are not a GGUF file that can be served; the message says why, as the end of a
    sentence."""


class Header(Struct, frozen=True):
    """What the box needs to know of a file.

    `kv_bytes_per_token` are the bytes of one cell of an f16 KV cache over all layers (an upper
    bound where a model keeps less, as sliding-window layers do).  A file that is part of a model
    says that it is number `part` (from 1) of `parts` with `all_tensors` in all; otherwise those are
    0.  `parameters` counts the numbers in its tensors; with `has_encoder` some of them read images.
    """

    architecture: str = ""
    kind: str = "model"
    context_length: int = 2048
    kv_bytes_per_token: int = 0
    tensors: int = 0
    part: int = 0
    parts: int = 0
    all_tensors: int = 0
    parameters: int = 0
    has_encoder: bool = False
    quantisation: str = ""


def read_header(path: Path, offset: int = 0, size: int | None = None) -> Header:
    """The header of the GGUF that is `size` bytes at `offset` of the file, or all from there on.

    It takes seconds if the file was made for that.  Raises BadGguf, also if the file ends before
    its last tensor does, and OSError.
    """
    with open_regular(path, buffering=0) as file:
        rest = file.seek(0, 2) - offset
        return _read(_Reader(file, offset, rest if size is None else min(size, rest)))


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


def is_no_model(why: str) -> bool:
    """Whether a file is not served because it is something else than a model, not because there is
    something wrong with it."""
    return why.startswith((_PROJECTOR, _OTHER_KIND))


def is_unfinished(why: str) -> bool:
    """Whether a file that is not served may be served once more of it was written."""
    return _INCOMPLETE in why or why == _EMPTY or why.endswith((_NO_ROOM, BEING_WRITTEN))


class _Reader:
    """Reads the file in windows, within its bounds.  Raises BadGguf."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self.at = 0  # where in the GGUF the next byte is
        self._window, self._begin = b"", 0  # bytes, and where in the GGUF they are
        self._left = _MAX_ITEMS

    def step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise BadGguf(f"its header has more than {_MAX_ITEMS:,} entries")

    def take(self, size: int) -> bytes:
        begin = self.at - self._begin
        if begin < 0 or begin + size > len(self._window):
            self._fill(size)
            begin = 0
        self.skip(size)
        return self._window[begin : begin + size]

    def skip(self, size: int) -> None:
        if size > self.size - self.at:
            raise BadGguf(_CUT_OFF)
        self.at += size
        if self.at > _MAX_HEADER_BYTES:
            raise BadGguf(f"its header has more than {_MAX_HEADER_BYTES >> 20} MiB")

    def skip_strings(self, count: int) -> None:
        """`count` lengths, each with so many bytes after it."""
        if count > (self.size - self.at) // 8:
            raise BadGguf(f"it has an array of {count} strings, {_NO_ROOM}")
        self.step(count)
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._fill(8)
            window, at, end = self._window, 0, len(self._window) - 8
            while count and at <= end:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at)

    def _fill(self, size: int) -> None:
        """Move the window here, with at least so many bytes.  Raises BadGguf if the file ends."""
        read_size = min(max(size, _WINDOW_BYTES), max(self.size - self.at, 0))
        self._file.seek(self._offset + self.at)
        data = bytearray()
        while len(data) < read_size and (more := self._file.read(read_size - len(data))):
            data += more
        if len(data) < size:
            raise BadGguf(_CUT_OFF)
        self._window, self._begin = bytes(data), self.at

    # -- values ------------------------------------------------------------------------------------

    def scalar(self, form: str) -> Scalar:
        value: Scalar = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def number(self, form: str) -> int:
        return int(self.scalar(form))

    def name(self) -> str:
        """Of a key or a tensor."""
        length = self.number("<Q")
        if length > _MAX_NAME_BYTES:
            raise BadGguf(f"it has a name of {length} bytes")
        return self.take(length).decode(errors="replace")

    def text(self) -> str | None:
        """A string value; None if it is longer than the box needs (a chat template, say)."""
        length = self.number("<Q")
        if length > _MAX_STRING_BYTES:
            raise BadGguf(f"it has a string of {length} bytes")
        if length <= _MAX_VALUE_BYTES:
            return self.take(length).decode(errors="replace")
        self.skip(length)
        return None


def _read(file: _Reader) -> Header:
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
    values = _Values(_metadata(file, keys))
    read = _read_tensors(file, tensors, values.alignment())
    if read.end > file.size:
        raise BadGguf(
            f"{_INCOMPLETE}: it has {file.size:,} bytes, and its tensors end at {read.end:,}"
        )
    return replace(values.header(tensors), parameters=read.parameters, has_encoder=read.has_encoder)


def _metadata(file: _Reader, count: int) -> dict[str, Scalar]:
    metadata: dict[str, Scalar | None] = {}
    for _ in range(count):
        file.step()
        key = file.name()
        if key in metadata:
            raise BadGguf(f"it has the key {printable(key, 80)} twice")
        metadata[key] = _value(file, file.number("<I"))
    return {key: value for key, value in metadata.items() if value is not None}


def _value(file: _Reader, kind: int) -> Scalar | None:
    if kind == _STRING:
        return file.text()
    if kind == _ARRAY:
        _skip_array(file)
        return None
    return file.scalar(_form(kind))


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise BadGguf(f"it has a value of the unknown type {kind}")
    return _SCALARS[kind]


def _skip_array(file: _Reader) -> None:
    kind, count = file.number("<I"), file.number("<Q")
    if kind == _STRING:
        file.skip_strings(count)
        return
    if kind == _ARRAY:
        raise BadGguf("it has an array of arrays, which llama.cpp does not read")
    size = struct.calcsize(_form(kind)) * count
    if size > file.size - file.at:
        raise BadGguf(f"it has an array of {count} values, {_NO_ROOM}")
    file.skip(size)


class _Tensors(NamedTuple):
    """Where the last tensor ends in the file, and see `Header`."""

    end: int
    parameters: int
    has_encoder: bool


def _read_tensors(file: _Reader, count: int, alignment: int) -> _Tensors:
    names: set[str] = set()
    end = parameters = 0
    for _ in range(count):
        file.step()
        name = file.name()
        if name in names:
            raise BadGguf(f"it has the tensor {printable(name, 80)} twice")
        names.add(name)
        dimensions = file.number("<I")
        if dimensions > 4:
            raise BadGguf(f"it has a tensor of {dimensions} dimensions")
        elements = math.prod(file.number("<Q") for _ in range(dimensions))
        kind, offset = file.number("<I"), file.number("<Q")
        block, size = TENSOR_TYPES.get(kind, (1, 0))
        if max(elements, offset) >= 2**62:
            raise BadGguf(f"its tensor {printable(name, 80)} is larger than any file")
        end = max(end, offset + elements // block * size)
        parameters += elements
    begin = -(-file.at // alignment) * alignment
    has_encoder = any(name.startswith(_ENCODER_TENSORS) for name in names)
    return _Tensors(begin + end if count else file.at, min(parameters, 2**62), has_encoder)


@dataclass(frozen=True)
class _Values:
    """The metadata; what is not plausible raises BadGguf."""

    metadata: dict[str, Scalar]

    def alignment(self) -> int:
        value = self._whole("general.alignment", 32, 1, 2**20)
        if value & (value - 1):
            raise BadGguf(f"its general.alignment is {value}, no power of 2")
        return value

    def header(self, tensors: int) -> Header:
        parts = self._whole("split.count", 0, 0, 65_535)
        return Header(
            architecture=self._text("general.architecture"),
            kind=self._text("general.type") or "model",
            context_length=self._of_architecture("context_length", 2048, 1, _MAX_INT),
            kv_bytes_per_token=self._kv_bytes(),
            tensors=tensors,
            part=self._whole("split.no", 0, 0, 65_535) + 1 if parts else 0,
            parts=parts,
            all_tensors=self._whole("split.tensors.count", 0, 0, _MAX_INT) if parts else 0,
            quantisation=_QUANTISATIONS.get(self._file_type(), ""),
        )

    def _file_type(self) -> int:
        value = self.metadata.get("general.file_type", -1)
        return value if isinstance(value, int) else -1  # it is for show: none is wrong

    def _kv_bytes(self) -> int:
        heads = max(1, self._of_architecture("attention.head_count", 1, 0, 65_536))
        kv_heads = self._of_architecture("attention.head_count_kv", heads, 0, 65_536)
        per_head = self._of_architecture("embedding_length", 0, 0, 2**24) // heads
        key = self._of_architecture("attention.key_length", per_head, 0, 2**24)
        value = self._of_architecture("attention.value_length", per_head, 0, 2**24)
        return self._of_architecture("block_count", 0, 0, 65_536) * kv_heads * (key + value) * 2

    def _of_architecture(self, key: str, default: int, minimum: int, maximum: int) -> int:
        """`context_length` of `llama.context_length`, say."""
        return self._whole(f"{self._text('general.architecture')}.{key}", default, minimum, maximum)

    def _whole(self, key: str, default: int, minimum: int, maximum: int) -> int:
        value = self.metadata.get(key, default)
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
