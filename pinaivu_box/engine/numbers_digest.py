"""The digest of the numbers that an output was drawn from: `logits_sha256` of a proof."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

_TOKEN = struct.Struct("<I")


class NumbersDigest:
    """SHA-256 over each token's id (u32, little-endian) and the bits of its logit (float32,
    little-endian) as the model gave it, before penalties, biases, grammar and temperature."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, token: int, logit: np.float32) -> None:
        self._sha256.update(_TOKEN.pack(token) + logit.tobytes())

    @property
    def digest(self) -> bytes:
        return self._sha256.digest()
