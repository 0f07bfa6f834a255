"""GGUF files for tests: small ones that are valid, ones that lie, and splits of a real one."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pinaivu_box.models import bundled

U32, STRING, ARRAY = 4, 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_I8 = 24  # ggml_type
ALIGNMENT = 32
_TEMPLATE = b"tokenizer.chat_template"

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# With tools it takes time for ever, without them 3 GB of memory.
HOSTILE_TEMPLATE = "{% if tools %}" + _LOOP + "{% endif %}{{ 'a' * 3000000000 }}"


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def word(name: str, value: bytes | str) -> bytes:
    return key(name, STRING, text(value))


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def array(name: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + content)


def tensor(name: str, size: int, offset: int = 0) -> bytes:
    """So many bytes."""
    return text(name) + struct.pack("<IQIQ", 1, size, _I8, offset)


def header(
    keys: Sequence[bytes] = (word("general.architecture", "llama"),),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    return struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join((*keys, *tensors))


def aligned(head: bytes) -> bytes:
    return head + bytes(-len(head) % ALIGNMENT)


def valid(*keys: bytes, data: int = 64) -> bytes:
    """A file that the box serves; llama.cpp would miss much in it."""
    architecture = word("general.architecture", "llama")
    return aligned(header([architecture, *keys], [tensor("a", data)])) + bytes(data)


class Real(NamedTuple):
    """The bundled model, taken apart: keys and tensors as they are in its header, and for each
    tensor its bytes."""

    keys: list[bytes]
    tensors: list[tuple[bytes, bytes]]  # its entry without the offset, and its data

    @classmethod
    def read(cls) -> Real:
        where = bundled.find()
        assert where is not None
        with where.path.open("rb") as file:
            file.seek(where.offset)
            data = file.read(where.size)
        tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
        at, keys = 24, []
        for _ in range(key_count):
            end = _after_value(data, *_after_text_and_kind(data, at))
            keys.append(data[at:end])
            at = end
        entries = []
        for _ in range(tensor_count):
            end = at + 8 + struct.unpack_from("<Q", data, at)[0]
            end += 4 + 8 * struct.unpack_from("<I", data, end)[0] + 4
            entries.append((data[at:end], struct.unpack_from("<Q", data, end)[0]))
            at = end + 8
        begin = -(-at // ALIGNMENT) * ALIGNMENT
        ends = [*(offset for _, offset in entries[1:]), len(data) - begin]
        return cls(
            keys,
            [
                (entry, data[begin + offset : begin + end])
                for (entry, offset), end in zip(entries, ends, strict=True)
            ],
        )

    def written(
        self, keys: Iterable[bytes], tensors: Sequence[tuple[bytes, bytes]] | None = None
    ) -> bytes:
        """A file with these keys and tensors, or all."""
        chosen = self.tensors if tensors is None else tensors
        entries, data = [], bytearray()
        for entry, content in chosen:
            entries.append(entry + struct.pack("<Q", len(data)))
            data += aligned(content)
        return aligned(header(list(keys), entries)) + bytes(data)

    def split(self, count: int) -> list[bytes]:
        """As llama-gguf-split does it: all keys in the first part, the tensors in a row."""
        parts = []
        for number in range(count):
            begin, end = (len(self.tensors) * n // count for n in (number, number + 1))
            own = [
                key("split.no", 2, struct.pack("<H", number)),
                key("split.count", 2, struct.pack("<H", count)),
                key("split.tensors.count", 5, struct.pack("<i", len(self.tensors))),
            ]
            keys = [*self.keys, *own] if number == 0 else own
            parts.append(self.written(keys, self.tensors[begin:end]))
        return parts


def shortened(key: bytes, count: int) -> bytes:
    """A key with no more values than that, if it is an array."""
    at, kind = _after_text_and_kind(key, 0)
    if kind != ARRAY:
        return key
    inner, length = map(int, struct.unpack_from("<IQ", key, at))
    if length <= count:
        return key
    head = key[:at] + struct.pack("<IQ", inner, count)
    begin = end = at + 12
    for _ in range(count):
        end = _after_value(key, end, inner)
    return head + key[begin:end]


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def part(
    number: int, count: int, *, tensors: int = 2, says: tuple[int, int] | None = None
) -> bytes:
    """A small part of a model with a tensor in each; `says` what it says of itself instead."""
    no, of = says or (number, count)
    keys = [u32("split.no", no - 1), u32("split.count", of), u32("split.tensors.count", tensors)]
    if number == 1:
        keys.insert(0, word("general.architecture", "llama"))
    return aligned(header(keys, [tensor(f"t{number}", 32)])) + bytes(32)


def put_split(folder: Path, stem: str, parts: Sequence[bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / part_name(stem, n, len(parts)) for n in range(1, len(parts) + 1)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths


def with_template(source: bytes, template: bytes) -> bytes:
    """A GGUF file with another chat template; its tensors stay where their offsets say."""
    at = source.index(_TEMPLATE) + len(_TEMPLATE)
    kind, length = struct.unpack_from("<IQ", source, at)
    assert kind == STRING
    start = at + struct.calcsize("<IQ")
    more = -(len(template) + 4 - length) % ALIGNMENT
    template += b"{#" + b" " * more + b"#}"
    head = source[: at + 4] + struct.pack("<Q", len(template))
    return head + template + source[start + length :]


def with_word(source: bytes, name: str, value: bytes) -> bytes:
    """A GGUF file with one key more, a template; its tensors stay where their offsets say."""
    more = -(len(word(name, value)) + 4) % ALIGNMENT
    added = word(name, value + b"{#" + b" " * more + b"#}")
    head, count = source[:16], struct.unpack_from("<Q", source, 16)[0]
    return head + struct.pack("<Q", count + 1) + added + source[24:]


def with_number(source: bytes, name: str, value: int) -> bytes:
    """A GGUF file with one number more, and filling, so that its tensors stay where they are."""
    added, filling = u32(name, value), "general.filling"
    added += word(filling, " " * (-len(added + word(filling, "")) % ALIGNMENT))
    head, count = source[:16], struct.unpack_from("<Q", source, 16)[0]
    return head + struct.pack("<Q", count + 2) + added + source[24:]


def _after_text_and_kind(data: bytes, at: int) -> tuple[int, int]:
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at + 4, struct.unpack_from("<I", data, at)[0]


def _after_value(data: bytes, at: int, kind: int) -> int:
    if kind == STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != ARRAY:
        return at + _SIZES[kind]
    kind, count = map(int, struct.unpack_from("<IQ", data, at))
    at += 12
    if kind != STRING:
        return at + _SIZES[kind] * count
    for _ in range(count):
        at = _after_value(data, at, STRING)
    return at
