"""Computed prefixes on disk: what an engine knew when it was unloaded is there when it wakes.

A file holds the cells of one sequence, its tokens before them, sealed with XChaCha20-Poly1305 in
pieces (libsodium's secretstream, which notices a piece that is missing, moved or changed).  The key
follows from a secret of the box and the model's digest, which the parent sends, and from the
engine's build, the type of the cache and the cache scope: what belongs to anything else cannot be
read, and is deleted when it claims otherwise.  Names of files are keyed hashes, and say nothing.

The folder is shared by the engines of a box; together its files stay within a budget, those that
were used last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from pinaivu_box.engine.messages import SavedPrefixes
from pinaivu_box.engine.prefix_cache import PrefixScope, common_prefix

SUFFIX, UNFINISHED = ".prefix", ".new"
MIN_TOKENS = 128  # fewer are computed as fast as they are read
_MAGIC = b"pinaivu-prefix/1\n"
_LENGTH = struct.Struct("<I")
_MAX_HEAD_BYTES = 16 * 1024 * 1024
_PIECE_BYTES = 1024 * 1024
_SEAL_BYTES = sodium.crypto_secretstream_xchacha20poly1305_ABYTES
_NONCE_BYTES = sodium.crypto_secretstream_xchacha20poly1305_HEADERBYTES
_MESSAGE = sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_FINAL = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL
_PEERS = "node_"  # what their scopes begin with (see `gateway.scopes`): theirs is not written down


class _Head(msgspec.Struct, frozen=True, array_like=True):
    tokens: bytes  # 32 bits each
    public: int
    common: str
    size: int  # of the cells


@dataclass(frozen=True)
class SavedPrefix:
    path: Path
    tokens: list[int]
    share: PrefixScope
    size: int


class _Damaged(Exception):
    """The file is not what this engine wrote for that scope."""


class PrefixStore:
    """`binding` is what the states depend on beside the model: the build, and the cache's type."""

    def __init__(self, settings: SavedPrefixes, binding: str) -> None:
        self._folder, self.max_bytes = Path(settings.folder), settings.max_bytes
        self._secret, self._binding = settings.key, binding
        self._known: dict[str, list[SavedPrefix]] = {}  # by scope, once it was asked for
        self._names = self._listed()

    def find(self, tokens: list[int], share: PrefixScope, known: int) -> SavedPrefix | None:
        """What has the longest prefix of these tokens, if that is `MIN_TOKENS` longer than the
        `known` one."""
        best, found = known + MIN_TOKENS, None
        for saved in self._of(share.scope):
            common = common_prefix(saved.tokens, tokens)
            # One that is mostly about something else would cost more than it saves.
            if saved.share == share and common >= best and 2 * common >= len(saved.tokens):
                best, found = common + 1, saved
        return found

    def read(self, saved: SavedPrefix) -> bytearray | None:
        """Its cells; None if the file is damaged or gone, which is then forgotten."""
        try:
            with saved.path.open("rb") as file:
                cells = self._unsealed(file, saved)
            os.utime(saved.path)  # it was used now
        except (OSError, _Damaged):
            self.forget(saved)
            return None
        return cells

    def forget(self, saved: SavedPrefix) -> None:
        """Delete what is of no use."""
        with suppress(ValueError):
            self._of(saved.share.scope).remove(saved)
        with suppress(OSError):
            saved.path.unlink()

    def is_wanted(self, tokens: list[int], share: PrefixScope) -> bool:
        """Whether that prefix may be saved, and is not yet."""
        if len(tokens) < MIN_TOKENS or not share.scope or share.scope.startswith(_PEERS):
            return False
        path = self._path(tokens, share)
        with suppress(OSError):
            os.utime(path)
        return not path.exists()

    def save(self, tokens: list[int], share: PrefixScope, cells: memoryview) -> bool:
        """Write a prefix, in place of what it continues; the files that were used longest ago make
        room.  Returns whether it was saved: there may be too little room for it."""
        path = self._path(tokens, share)
        partial = path.with_suffix(f".{os.getpid()}{UNFINISHED}")
        head = msgspec.msgpack.encode(
            _Head(array("i", tokens).tobytes(), share.public, share.common, len(cells))
        )
        size = len(head) + len(cells)
        try:
            if not self._make_room(size):
                return False
            descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                self._seal(file, share.scope, head, cells)
            partial.rename(path)
        except OSError:  # the disk is full, or the folder is gone
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        for shorter in list(self._of(share.scope)):
            if shorter.tokens == tokens[: len(shorter.tokens)]:
                self.forget(shorter)
        return True

    # -- files ---------------------------------------------------------------------------------

    def _listed(self) -> dict[str, list[Path]]:
        """The files by what the first half of their names says of their scope."""
        names: dict[str, list[Path]] = {}
        for path in self._folder.glob(f"*{SUFFIX}"):
            names.setdefault(path.name.partition("-")[0], []).append(path)
        return names

    def _of(self, scope: str) -> list[SavedPrefix]:
        """The prefixes of a scope.  Files that claim to be and are not are deleted."""
        if scope not in self._known:
            self._known[scope] = []
            for path in self._names.pop(self._tag(scope), []):
                try:
                    self._known[scope].append(self._described(path, scope))
                except OSError:
                    continue
                except _Damaged:
                    path.unlink(missing_ok=True)
        return self._known[scope]

    def _described(self, path: Path, scope: str) -> SavedPrefix:
        """Raises OSError, _Damaged."""
        with path.open("rb") as file:
            head, _ = self._opened(file, scope)
        tokens = array("i", head.tokens).tolist()
        share = PrefixScope(scope, head.public, head.common)
        if path != self._path(tokens, share):
            raise _Damaged  # it was renamed
        return SavedPrefix(path, tokens, share, head.size)

    def _make_room(self, size: int) -> bool:
        if size > self.max_bytes or shutil.disk_usage(self._folder).free < 2 * size:
            return False
        files = [(path.stat(), path) for path in self._folder.glob("*.*")]
        taken = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
            if taken + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            taken -= stat.st_size
        return True

    # -- sealing -------------------------------------------------------------------------------

    def _key(self, scope: str, purpose: bytes) -> bytes:
        bound = f"{self._binding}\n{scope}".encode()
        return hashlib.blake2b(bound, key=self._secret, digest_size=32, person=purpose).digest()

    def _tag(self, scope: str) -> str:
        return self._key(scope, b"scope")[:12].hex()

    def _path(self, tokens: list[int], share: PrefixScope) -> Path:
        names = f"{share.public}\n{share.common}\n".encode() + array("i", tokens).tobytes()
        key = self._key(share.scope, b"name")
        name = hashlib.blake2b(names, key=key, digest_size=12).hexdigest()
        return self._folder / f"{self._tag(share.scope)}-{name}{SUFFIX}"

    def _seal(self, file: BinaryIO, scope: str, head: bytes, cells: memoryview) -> None:
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        key = self._key(scope, b"cells")
        file.write(_MAGIC + sodium.crypto_secretstream_xchacha20poly1305_init_push(state, key))
        sealed = sodium.crypto_secretstream_xchacha20poly1305_push(state, head, _MAGIC, _MESSAGE)
        file.write(_LENGTH.pack(len(sealed)) + sealed)
        for start in range(0, len(cells) or 1, _PIECE_BYTES):
            tag = _MESSAGE if start + _PIECE_BYTES < len(cells) else _FINAL
            piece = bytes(cells[start : start + _PIECE_BYTES])
            file.write(sodium.crypto_secretstream_xchacha20poly1305_push(state, piece, _MAGIC, tag))

    def _opened(
        self, file: BinaryIO, scope: str
    ) -> tuple[_Head, sodium.crypto_secretstream_xchacha20poly1305_state]:
        """The head, and the state in which the cells can be read.  Raises _Damaged."""
        nonce = file.read(len(_MAGIC) + _NONCE_BYTES)
        length = file.read(_LENGTH.size)
        if not nonce.startswith(_MAGIC) or len(length) < _LENGTH.size:
            raise _Damaged
        (size,) = _LENGTH.unpack(length)
        if size > _MAX_HEAD_BYTES:
            raise _Damaged
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        try:
            sodium.crypto_secretstream_xchacha20poly1305_init_pull(
                state, nonce[len(_MAGIC) :], self._key(scope, b"cells")
            )
            head, _ = sodium.crypto_secretstream_xchacha20poly1305_pull(
                state, file.read(size), _MAGIC
            )
            return msgspec.msgpack.decode(head, type=_Head), state
        except (CryptoError, ValueError, TypeError, RuntimeError) as error:
            raise _Damaged from error

    def _unsealed(self, file: BinaryIO, saved: SavedPrefix) -> bytearray:
        """Raises _Damaged, OSError."""
        head, state = self._opened(file, saved.share.scope)
        cells, ended = bytearray(), False
        for piece in _pieces(file):
            try:
                text, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(state, piece, _MAGIC)
            except (CryptoError, ValueError, TypeError, RuntimeError) as error:
                raise _Damaged from error
            cells += text
            ended = tag == _FINAL
            if ended or len(cells) > head.size:
                break
        if not ended or len(cells) != head.size or file.read(1):
            raise _Damaged
        return cells


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES + _SEAL_BYTES):
        yield piece
