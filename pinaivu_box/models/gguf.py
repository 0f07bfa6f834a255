"""The facts in a GGUF file's header, read without llama.cpp (which the parent never loads).

Format: ggml/docs/gguf.md.  Arrays (vocabularies, merges) are skipped, so this takes milliseconds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

Scalar = int | float | bool | str

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f",
    7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_STRING = 16 * 1024 * 1024
_MAX_ARRAY = 2**40


class BadGguf(ValueError):
    """The bytes are not a GGUF file that we understand; the message says what is wrong."""


@dataclass(frozen=True)
class Header:
    """`metadata` holds the scalar and string values."""

    metadata: dict[str, Scalar]

    def number(self, key: str, default: int = 0) -> int:
        """An architecture's value, e.g. `context_length` of `llama.context_length`."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)
        return int(value) if isinstance(value, int | float) else default

    @property
    def context_length(self) -> int:
        return self.number("context_length", 2048)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one cell of an f16 KV cache over all layers (an upper bound where a model
        keeps less, as sliding-window layers do)."""
        heads = max(1, self.number("attention.head_count", 1))
        kv_heads = self.number("attention.head_count_kv", heads)
        per_head = self.number("embedding_length") // heads
        key = self.number("attention.key_length", per_head)
        value = self.number("attention.value_length", per_head)
        return self.number("block_count") * kv_heads * (key + value) * 2


def read_header(path: Path, offset: int = 0) -> Header:
    """Raises BadGguf, OSError."""
    with path.open("rb") as file:
        file.seek(offset)
        try:
            return _read_header(file)
        except RecursionError:
            raise BadGguf("it has arrays inside arrays without end") from None


def ends_early(path: Path, offset: int, size: int) -> bool:
    """Whether a GGUF of `size` bytes lacks the beginning of a tensor, as half a download does.

    The end of the last tensor is left to llama.cpp, which knows how large each type is.  Raises
    BadGguf, OSError.
    """
    with path.open("rb") as file:
        file.seek(offset)
        header = _read_header(file)
        begins = file.tell() - offset
        file.seek(offset + 8)
        count, last = int(_scalar(file, "<Q")), 0
        file.seek(offset + begins)
        for _ in range(count):
            _string(file)
            _skip(file, 8 * int(_scalar(file, "<I")) + 4)  # dimensions and type
            last = max(last, int(_scalar(file, "<Q")))
        begins = file.tell() - offset
    alignment = int(header.metadata.get("general.alignment", 32)) or 32
    return -(-begins // alignment) * alignment + last >= size


def _read_header(file: BinaryIO) -> Header:
    if file.read(4) != b"GGUF":
        raise BadGguf("it does not begin with the letters GGUF")
    version = _scalar(file, "<I")
    if version not in (2, 3):
        raise BadGguf(f"it is of GGUF version {version}; 2 and 3 are known")
    file.seek(8, 1)  # tensor count
    count = int(_scalar(file, "<Q"))
    metadata: dict[str, Scalar] = {}
    for _ in range(count):
        key = _string(file)
        value = _value(file, int(_scalar(file, "<I")))
        if value is not None:
            metadata[key] = value
    return Header(metadata)


def _value(file: BinaryIO, kind: int) -> Scalar | None:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        _skip_array(file)
        return None
    if kind not in _SCALARS:
        raise BadGguf(f"it has a value of the unknown type {kind}")
    return _scalar(file, _SCALARS[kind])


def _skip_array(file: BinaryIO) -> None:
    kind, count = int(_scalar(file, "<I")), int(_scalar(file, "<Q"))
    if kind in _SCALARS:
        _skip(file, struct.calcsize(_SCALARS[kind]) * count)
        return
    for _ in range(count):
        if kind == _STRING:
            _skip(file, int(_scalar(file, "<Q")))
        else:
            _value(file, kind)


def _skip(file: BinaryIO, size: int) -> None:
    if size > _MAX_ARRAY:
        raise BadGguf(f"it has an array of {size} bytes")
    file.seek(size, 1)


def _scalar(file: BinaryIO, form: str) -> Scalar:
    data = file.read(struct.calcsize(form))
    try:
        value: Scalar = struct.unpack(form, data)[0]
    except struct.error:
        raise BadGguf("it ends in the middle of its header") from None
    return value


def _string(file: BinaryIO) -> str:
    length = int(_scalar(file, "<Q"))
    if length > _MAX_STRING:
        raise BadGguf(f"it has a string of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise BadGguf("it ends in the middle of its header")
    return data.decode(errors="replace")
