"""Signed notes (C2SP signed-note): a text and lines of signatures, each by a named key.

Pure, and strict: whatever is accepted here is read alike by every other reader of the format.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from pinaivu_box.text import END

MAX_NOTE_BYTES = 65536
MAX_SIGNATURES = 64
ED25519 = 0x01  # a signature over the text
COSIGNATURE = 0x04  # by a witness, with a time (C2SP tlog-cosignature)
_KEY_ID_BYTES = 4
_KEY_BYTES = 32
_DASH = "— "
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_NAME = re.compile(r"[^\s+]{1,256}" + END)


class NoteError(ValueError):
    """The text is no signed note; says why, as the end of a sentence."""


class NoteKey(NamedTuple):
    """A public Ed25519 key (32 bytes) under a name, for one type of signature."""

    name: str
    public: bytes
    type: int = ED25519

    @property
    def id(self) -> bytes:
        digest = hashlib.sha256(self.name.encode() + b"\n" + bytes([self.type]) + self.public)
        return digest.digest()[:_KEY_ID_BYTES]

    @property
    def text(self) -> str:
        """The key as other programs are given it (a "vkey")."""
        return f"{self.name}+{self.id.hex()}+{encode(bytes([self.type]) + self.public)}"


class NoteSignature(NamedTuple):
    """`signature` is what the type of the key makes of it; unverified."""

    name: str
    key_id: bytes
    signature: bytes

    @property
    def line(self) -> str:
        return f"{_DASH}{self.name} {encode(self.key_id + self.signature)}\n"

    def is_by(self, key: NoteKey) -> bool:
        """Whether it says that it is; not whether it is."""
        return self.name == key.name and self.key_id == key.id


class Note(NamedTuple):
    """`text` ends with a newline, and is what signatures cover."""

    text: str
    signatures: tuple[NoteSignature, ...]

    def __str__(self) -> str:
        return f"{self.text}\n{''.join(signature.line for signature in self.signatures)}"


def read(data: str) -> Note:
    """Raises NoteError."""
    if len(data.encode(errors="replace")) > MAX_NOTE_BYTES:
        raise NoteError(f"it is longer than {MAX_NOTE_BYTES} bytes")
    if _CONTROL.search(data):
        raise NoteError("it contains a control character")
    text, separator, lines = data.rpartition("\n\n")
    if not separator or not lines.endswith("\n"):
        raise NoteError("it has no signatures after an empty line")
    return Note(text + "\n", read_signatures(lines))


def read_signatures(lines: str) -> tuple[NoteSignature, ...]:
    """Of lines that each end with a newline.  Raises NoteError."""
    if not lines.endswith("\n"):
        raise NoteError("its last line does not end")
    signatures = tuple(_signature(line) for line in lines[:-1].split("\n"))
    if len(signatures) > MAX_SIGNATURES:
        raise NoteError(f"it has more than {MAX_SIGNATURES} signatures")
    if len({(each.name, each.key_id) for each in signatures}) < len(signatures):
        raise NoteError("two of its signatures are by one key")
    return signatures


def joined(note: Note, signatures: Iterable[NoteSignature]) -> Note:
    """The note with these signatures after its own; of one key, its first counts."""
    first: dict[tuple[str, bytes], NoteSignature] = {}
    for each in (*note.signatures, *signatures):
        first.setdefault((each.name, each.key_id), each)
    return Note(note.text, tuple(first.values()))


def read_key(text: str, kind: int) -> NoteKey:
    """A key of that type as other programs write it (a "vkey").  Raises NoteError."""
    name, plus, rest = text.partition("+")
    digits, plus, encoded = rest.partition("+")
    data = decode(encoded)
    if not plus or len(data) != 1 + _KEY_BYTES or data[0] != kind:
        raise NoteError(f"it is not a key as in NAME+ID+BASE64, for Ed25519 of the type {kind}")
    key = NoteKey(name, data[1:], kind)
    if key.id.hex() != digits:
        raise NoteError("its id is not that of its name and key")
    return key


def encode(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def decode(text: str) -> bytes:
    """Base64 in the one spelling that RFC 4648, section 4, gives these bytes.  Raises NoteError."""
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        data = b""
    if encode(data) != text:
        raise NoteError("it contains a text that is not Base64 in its one spelling")
    return data


def _signature(line: str) -> NoteSignature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space or not _NAME.match(name):
        raise NoteError("one of its signatures is not a dash, a name and Base64")
    data = decode(encoded)
    if len(data) <= _KEY_ID_BYTES:
        raise NoteError("one of its signatures is too short")
    return NoteSignature(name, data[:_KEY_ID_BYTES], data[_KEY_ID_BYTES:])
