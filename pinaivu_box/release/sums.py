"""The digests of a release's files (`SHA256SUMS`), and the signature over them.

`SHA256SUMS` has the format of sha256sum, `SHA256SUMS.sig` is the Ed25519 signature (RFC 8032) over
its bytes, 64 bytes without any encoding.  `sha256sum --check` and `openssl pkeyutl -verify` read
both.  The names of a release's files contain its version, so a signature that is valid for one
release is not valid for the files of another.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pinaivu_box.errors import ReleaseNotVerified, quoted

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"  # the names of the two files in a release
MAX_SUMS_BYTES = 65_536  # a release has some ten files; whoever fetches one reads no more than this
SIGNATURE_BYTES = 64
PUBLIC_KEY = Path(__file__).parent / "public_key.pem"
# A name is a plain file name: it names nothing outside a folder, no hidden file and no option.
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([A-Za-z0-9][A-Za-z0-9._+-]{0,199})")


def verified(sums: bytes, signature: bytes, public_key_pem: bytes) -> dict[str, str]:
    """Verify `SHA256SUMS` and return what it says: file name -> SHA-256 in hex.

    `public_key_pem` is the release key (PEM, SubjectPublicKeyInfo).  Nothing of `sums` is parsed
    before the signature over it is verified.

    Raises ReleaseNotVerified.
    """
    try:
        _public_key(public_key_pem).verify(signature, sums)
    except InvalidSignature as error:
        raise ReleaseNotVerified(
            f"The signature over {SUMS} is not of the release key: delete these files, and download"
            " the release again from its own page."
        ) from error
    return parse(sums)


def parse(sums: bytes) -> dict[str, str]:
    """Return what `SHA256SUMS` says: file name -> SHA-256 in hex.

    Raises ReleaseNotVerified for anything but lines of sha256sum's format about different plain
    file names.
    """
    if len(sums) > MAX_SUMS_BYTES:
        raise ReleaseNotVerified(f"{SUMS} is longer than {MAX_SUMS_BYTES} bytes.")
    *lines, rest = sums.decode("utf-8", "replace").split("\n")
    if rest or not lines:
        raise ReleaseNotVerified(f"{SUMS} is empty, or its end is missing.")
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ReleaseNotVerified(
                f"Line {number} of {SUMS} is not a SHA-256 digest and a file name: '{quoted(line)}'"
            )
        digest, name = match.groups()
        if name in found:
            raise ReleaseNotVerified(f"{SUMS} has more than one line for {name}.")
        found[name] = digest
    return found


def check(path: Path, name: str, digests: dict[str, str]) -> None:
    """Check that the file at `path` is the release's file `name`.

    Raises ReleaseNotVerified, and OSError if it cannot be read.
    """
    wanted = digests.get(name)
    if wanted is None:
        raise ReleaseNotVerified(
            f"{quoted(name)} is not in {SUMS}: it belongs to another release, or was renamed."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ReleaseNotVerified(
            f"{name} is not the file that was released: its SHA-256 differs from the signed one; "
            "delete it, and download it again."
        )


def public_key() -> bytes | None:
    """The release key that comes with this program (PEM); None if it has none."""
    try:
        return PUBLIC_KEY.read_bytes()
    except FileNotFoundError:
        return None


def _public_key(pem: bytes) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise ReleaseNotVerified(
            "The release key is not a public key in PEM form (it begins with "
            "'-----BEGIN PUBLIC KEY-----')."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ReleaseNotVerified("The release key is not an Ed25519 key.")
    return key
