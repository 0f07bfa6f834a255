"""Headers of model files with some bytes changed, of a model that llama.cpp loads unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.support import gguf_files

_WORDS = 400  # of the vocabulary that stay: most bytes of a header are words
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    48,
    64,
    255,
    576,
    4096,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)


def original() -> bytes:
    """The bundled model with a short vocabulary and small tensors alone."""
    real = gguf_files.Real.read()
    keys = [gguf_files.shortened(key, _WORDS) for key in real.keys]
    return real.written(keys, [one for one in real.tensors if len(one[1]) < 4096])


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """So many, each with one to three changes; the same for the same seed."""
    data, draw = original(), random.Random(seed)
    names = _names(data)
    end = data.rindex(b".weight") + 64  # behind it are the tensors' data
    for _ in range(count):
        made = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 3))):
            _change(made, draw, names, end)
        if draw.random() < 0.1:
            del made[draw.randrange(end) :]
        yield bytes(made)


def _names(data: bytes) -> list[int]:
    """Where the lengths of the keys' names are, each before it."""
    marks = (b"general.", b"llama.", b"tokenizer.", b"blk.", b"split.")
    places = {data.find(mark, at) for mark in marks for at in range(0, len(data), 64)}
    return sorted(place - 8 for place in places if place >= 8)


def _change(made: bytearray, draw: random.Random, names: list[int], end: int) -> None:
    """Some bytes anywhere, or what stands near a name: its length, the type and the value."""
    kind = draw.random()
    if kind < 0.3:
        where, size = draw.randrange(end), draw.choice((1, 1, 4, 8))
        made[where : where + size] = draw.randbytes(size)
    elif kind < 0.4:
        where = draw.randrange(24)
        made[where : where + 1] = draw.randbytes(1)
    elif kind < 0.9:
        length = int.from_bytes(made[(at := draw.choice(names)) : at + 8], "little")
        where = at + 8 + length + draw.choice((-8 - length, 0, 4, 4, 4, 4, 8, 12))
        size = draw.choice((4, 4, 4, 8))
        number = draw.choice(_NUMBERS) % 2 ** (8 * size)
        made[where : where + size] = number.to_bytes(size, "little")
    else:  # a part is there twice, or moved
        begin, size = draw.randrange(end), draw.randrange(1, 64)
        where = draw.randrange(end)
        made[where : where + size] = made[begin : begin + size]
