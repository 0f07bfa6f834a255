"""A log written for tests, without the package: the recursive definitions of RFC 6962, signatures
by PyNaCl, notes put together by hand."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from nacl.signing import SigningKey, VerifyKey

Hashes = list[bytes]


def tree_hash(entries: Sequence[bytes]) -> bytes:
    """MTH (RFC 6962, section 2.1)."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    split = _split(len(entries))
    return _node(tree_hash(entries[:split]), tree_hash(entries[split:]))


def consistency(old: int, entries: Sequence[bytes]) -> Hashes:
    """PROOF (RFC 6962, section 2.1.2)."""
    return _subproof(old, entries, True) if 0 < old < len(entries) else []


def _subproof(old: int, entries: Sequence[bytes], whole: bool) -> Hashes:
    if old == len(entries):
        return [] if whole else [tree_hash(entries)]
    split = _split(len(entries))
    if old <= split:
        return [*_subproof(old, entries[:split], whole), tree_hash(entries[split:])]
    return [*_subproof(old - split, entries[split:], False), tree_hash(entries[:split])]


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class WrittenLog:
    """A box's log with these entries, whatever they are."""

    def __init__(self, key: SigningKey, epoch: int = 1_700_000_000_000, seed: str = "") -> None:
        self.key, self.epoch = key, epoch
        self.node_id = "node_" + key.verify_key.encode().hex()
        self.origin = f"pinaivu/log/{self.node_id}/{epoch}"
        self.seed, self.entries = seed, list[bytes]()

    def grow(self, size: int, seed: str | None = None) -> WrittenLog:
        """To that many entries, which follow from the seed."""
        seed = self.seed if seed is None else seed
        for number in range(len(self.entries), size):
            self.entries.append(hashlib.sha256(f"{seed}{number}".encode()).digest())
        return self

    def text(self, size: int | None = None) -> str:
        size = len(self.entries) if size is None else size
        return f"{self.origin}\n{size}\n{b64(tree_hash(self.entries[:size]))}\n"

    def note(self, size: int | None = None, text: str | None = None) -> str:
        return self.signed(self.text(size) if text is None else text)

    def signed(self, text: str) -> str:
        return f"{text}\n{self.line(self.origin, self.key, text)}"

    def proof(self, old: int, size: int | None = None) -> Hashes:
        return consistency(old, self.entries[:size])

    def submission(self, old: int, size: int | None = None) -> str:
        lines = "".join(f"{b64(each)}\n" for each in self.proof(old, size))
        return f"old {old}\n{lines}\n{self.note(size)}"

    @staticmethod
    def line(name: str, key: SigningKey, text: str) -> str:
        public = key.verify_key.encode()
        key_id = hashlib.sha256(name.encode() + b"\n\x01" + public).digest()[:4]
        return f"— {name} {b64(key_id + key.sign(text.encode()).signature)}\n"


def cosignature_time(line: str, witness: SigningKey | bytes, text: str) -> int:
    """The time in a cosignature v1 of a box, verified (C2SP tlog-cosignature).  Raises what the
    library raises if it is wrong."""
    key = witness if isinstance(witness, bytes) else witness.verify_key.encode()
    name = f"pinaivu/witness/node_{key.hex()}"
    dash, said, encoded = line.removesuffix("\n").split(" ")
    assert (dash, said) == ("—", name)
    data = base64.b64decode(encoded, validate=True)
    key_id, time, signature = data[:4], int.from_bytes(data[4:12], "big"), data[12:]
    assert key_id == hashlib.sha256(name.encode() + b"\n\x04" + key).digest()[:4]
    VerifyKey(key).verify(f"cosignature/v1\ntime {time}\n{text}".encode(), signature)
    return time
