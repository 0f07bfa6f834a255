"""Vectors as the box passes them on: little-endian float32, of length 1."""

from __future__ import annotations

import math
import struct


def shortened(vector: bytes, size: int) -> bytes:
    """The first of its numbers, at length 1 again (Matryoshka embeddings, Kusupati et al. 2022).

    A vector that has no more than `size` of them is returned as it is.
    """
    if len(vector) <= 4 * size:
        return vector
    numbers = struct.unpack(f"<{size}f", vector[: 4 * size])
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return struct.pack(f"<{size}f", *(number / length for number in numbers))
