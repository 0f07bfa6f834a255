"""A folder with files as build/release leaves them, signed with a key of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pinaivu_box.release.sums import SIGNATURE, SUMS


@dataclass(frozen=True)
class ReleasedFiles:
    """`public_key` is PEM."""

    folder: Path
    key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        public = self.key.public_key()
        return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def add(self, name: str, content: bytes) -> Path:
        """Release one more file, and sign again."""
        path = self.folder / name
        path.write_bytes(content)
        sums = self.folder / SUMS
        before = sums.read_text() if sums.exists() else ""
        self.sign(before + f"{hashlib.sha256(content).hexdigest()}  {name}\n")
        return path

    def sign(self, sums: str) -> None:
        """Release these sums, whatever they say."""
        (self.folder / SUMS).write_text(sums)
        (self.folder / SIGNATURE).write_bytes(self.key.sign(sums.encode()))


def released(folder: Path, files: dict[str, bytes]) -> ReleasedFiles:
    made = ReleasedFiles(folder, Ed25519PrivateKey.generate())
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        made.add(name, content)
    return made
