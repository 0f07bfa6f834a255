"""The Ed25519 key pair of the box, which identifies it to peers and signs its receipts."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from pinaivu_box.errors import CliError
from pinaivu_box.text import NODE_ID

NODE_PREFIX = "node_"
_NODE_ID = re.compile(NODE_ID)


@dataclass(frozen=True)
class Identity:
    signing_key: SigningKey

    @property
    def node_id(self) -> str:
        """`node_` and the 64 hex digits of the public key."""
        return NODE_PREFIX + self.signing_key.verify_key.encode().hex()

    def secret(self, domain: str) -> bytes:
        """32 bytes that only this box has; those of one domain tell nothing of another's."""
        seed = self.signing_key.encode()
        return hashlib.blake2b(domain.encode(), key=seed, digest_size=32).digest()

    def sign(self, domain: str, message: bytes) -> bytes:
        """64-byte Ed25519 signature (RFC 8032) over `domain`, a newline and `message`.

        The domain prevents that a signature for one purpose is replayed for another.
        """
        return self.signing_key.sign(domain.encode() + b"\n" + message).signature


def verify(node_id: str, domain: str, message: bytes, signature: bytes) -> bool:
    """Whether `signature` was made with the key of `node_id`.

    Only one spelling of an id is valid, although `bytes.fromhex` accepts capitals and spaces.
    """
    if not _NODE_ID.search(node_id):
        return False
    try:
        key = VerifyKey(bytes.fromhex(node_id.removeprefix(NODE_PREFIX)))
        key.verify(domain.encode() + b"\n" + message, signature)
    except (BadSignatureError, ValueError, TypeError):
        return False
    return True


def load_or_create(path: Path) -> Identity:
    """Read the 32-byte seed in `path` (hex), or create one with mode 0600.  Raises CliError."""
    if not path.exists():
        _create(path)
    try:
        return Identity(SigningKey(bytes.fromhex(path.read_text().strip())))
    except (ValueError, TypeError) as error:
        raise CliError(
            f"The identity file {path} is damaged: restore it from a backup, or move it away, "
            "so that the box creates a new identity."
        ) from error


def _create(path: Path) -> None:
    # Written to another file and linked into place: a crash leaves no partial key, and if two
    # processes start at the same time, both read the key of the first.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(SigningKey.generate().encode().hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # the other process won
    finally:
        temporary.unlink()
