"""The signed digests of a release, and where releases are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from email.message import Message
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pinaivu_box.errors import ReleaseNotVerified
from pinaivu_box.release import place, sums
from tests.support.paths import ROOT
from tests.support.released_files import ReleasedFiles, released

PROGRAM = "pinaivu-1.2.3-linux-x86_64"
DIGEST = "a" * 64


@pytest.fixture
def release(tmp_path: Path) -> ReleasedFiles:
    return released(tmp_path / "release", {PROGRAM: b"program", "install.sh": b"#!/bin/sh\n"})


def read(release: ReleasedFiles) -> tuple[bytes, bytes]:
    folder = release.folder
    return (folder / sums.SUMS).read_bytes(), (folder / sums.SIGNATURE).read_bytes()


def test_what_the_release_key_signed_is_known_by_name(release: ReleasedFiles) -> None:
    digests = sums.verified(*read(release), release.public_key)
    assert sorted(digests) == ["install.sh", PROGRAM]
    program = release.folder / PROGRAM
    sums.check(program, PROGRAM, digests)
    with pytest.raises(ReleaseNotVerified, match="is not in SHA256SUMS"):
        sums.check(program, "pinaivu-1.2.2-linux-x86_64", digests)
    program.write_bytes(b"programs")
    with pytest.raises(ReleaseNotVerified, match="is not the file that was released"):
        sums.check(program, PROGRAM, digests)


def test_every_changed_bit_is_noticed(release: ReleasedFiles) -> None:
    listed, signature = read(release)
    for content, other, swapped in ((listed, signature, False), (signature, listed, True)):
        for at in range(0, len(content), 7):
            changed = bytearray(content)
            changed[at] ^= 1
            pair = (other, bytes(changed)) if swapped else (bytes(changed), other)
            with pytest.raises(ReleaseNotVerified, match="signature"):
                sums.verified(*pair, release.public_key)


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\0" * 63, b"\0" * 65, b"\0" * 10_000])
def test_no_other_bytes_are_a_signature(release: ReleasedFiles, signature: bytes) -> None:
    with pytest.raises(ReleaseNotVerified, match="signature"):
        sums.verified(read(release)[0], signature, release.public_key)


def test_another_key_signs_nothing(release: ReleasedFiles, tmp_path: Path) -> None:
    other = released(tmp_path / "other", {PROGRAM: b"program"})
    with pytest.raises(ReleaseNotVerified, match="not of the release key"):
        sums.verified(*read(release), other.public_key)


def test_a_key_of_another_kind_is_refused(release: ReleasedFiles) -> None:
    elliptic = generate_private_key(SECP256R1()).public_key()
    pem = elliptic.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for key, why in ((pem, "not an Ed25519 key"), (b"", "PEM"), (b"\xff" * 99, "PEM")):
        with pytest.raises(ReleaseNotVerified, match=why):
            sums.verified(*read(release), key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{DIGEST}  a",  # cut off
        f"{DIGEST}  a\r\n",
        f"{DIGEST} a\n",
        f"{DIGEST}   a\n",
        f"{DIGEST}\ta\n",
        f" {DIGEST}  a\n",
        f"\\{DIGEST}  a\\n\n",
        f"{DIGEST.upper()}  a\n",
        f"{DIGEST[1:]}  a\n",
        f"{DIGEST}0  a\n",
        f"{DIGEST}  a\n\n",
        f"{DIGEST}  a\n{DIGEST}  a\n",
        f"{DIGEST}  a\n{'b' * 64} *a\n",
        f"{DIGEST}  ../a\n",
        f"{DIGEST}  /a\n",
        f"{DIGEST}  ..\n",
        f"{DIGEST}  .a\n",
        f"{DIGEST}  -rf\n",
        f"{DIGEST}  a b\n",
        f"{DIGEST}  a\0b\n",
        f"{DIGEST}  \N{FULLWIDTH DIGIT ONE}\n",
        f"{DIGEST}  {'a' * 201}\n",
        f"{DIGEST}  a\n# comment\n",
        f"{DIGEST}  a\n" * 2000,
    ],
)
def test_sums_are_read_strictly_even_if_signed(release: ReleasedFiles, text: str) -> None:
    release.sign(text)
    with pytest.raises(ReleaseNotVerified):
        sums.verified(*read(release), release.public_key)


def test_sums_are_those_of_sha256sum(release: ReleasedFiles) -> None:
    """In text and in binary mode."""
    files = [PROGRAM, "install.sh"]
    for mode in ("--text", "--binary"):
        made = subprocess.run(
            ["sha256sum", mode, *files], cwd=release.folder, check=True, capture_output=True
        )
        assert sums.parse(made.stdout) == sums.verified(*read(release), release.public_key)
    subprocess.run(["sha256sum", "--check", sums.SUMS], cwd=release.folder, check=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl")
def test_openssl_verifies_the_same(release: ReleasedFiles) -> None:
    (release.folder / "key.pem").write_bytes(release.public_key)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin"]
    command += ["-in", sums.SUMS, "-sigfile", sums.SIGNATURE]
    assert subprocess.run(command, cwd=release.folder, check=False).returncode == 0
    with (release.folder / sums.SUMS).open("a") as file:
        file.write("\n")
    assert subprocess.run(command, cwd=release.folder, check=False).returncode == 1


def test_the_committed_key_is_a_public_one_or_absent() -> None:
    pem = sums.public_key()
    assert pem is None or re.fullmatch(
        rb"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=]{60}\n-----END PUBLIC KEY-----\n", pem
    )


def test_the_page_of_releases_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pyproject.toml, which an installed package has as metadata."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Releases"]
    assert place.releases_url({}) == named.rstrip("/")
    assert (
        place.releases_url({"PINAIVU_RELEASES": "http://127.0.0.1:1/x/"}) == "http://127.0.0.1:1/x"
    )
    installed = Message()
    installed["Project-URL"] = f"Releases, {named}"
    monkeypatch.setattr(place, "PYPROJECT", ROOT / "absent")
    monkeypatch.setattr(place, "metadata", lambda _name: installed)
    assert place.releases_url({}) == named.rstrip("/")
