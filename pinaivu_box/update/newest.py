"""The newest release: which one it is, and its executable, downloaded and verified.

A page of releases has, as GitHub's and any static file server's,

    latest/download/SHA256SUMS            the digests of the newest release; the names in it have
                                          its version
    download/vVERSION/SHA256SUMS.sig      the signature over them
    download/vVERSION/NAME                its files

and build/install.sh reads the same.  Nothing is believed before the signature is verified.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import httpx

import pinaivu_box
from pinaivu_box.errors import UpdateFailed
from pinaivu_box.release import sums
from pinaivu_box.update import versions

MAX_EXECUTABLE_BYTES = 4 << 30
_CHUNK_BYTES = 1 << 20
_CONNECT_SECONDS, _STALL_SECONDS = 30.0, 60.0
_MAX_REDIRECTS = 5


class Release(NamedTuple):
    """The executable of a release: the name of its file, its SHA-256 in hex, its URL."""

    version: str
    name: str
    digest: str
    url: str


def newest(releases: str, variant: str, public_key: bytes) -> Release:
    """Find the executable for this machine in the newest release.

    `releases` is the URL of the page; `variant` is "" for the executable without a backend for
    GPUs, or the backend's name; `public_key` is the release key (PEM).

    Raises UpdateFailed, ReleaseNotVerified.
    """
    with _client(releases) as client:
        listed = _document(client, f"{releases}/latest/download/{sums.SUMS}", sums.MAX_SUMS_BYTES)
        version, name = _find(listed, variant, releases)
        folder = f"{releases}/download/v{version}"
        signature = _document(client, f"{folder}/{sums.SIGNATURE}", sums.SIGNATURE_BYTES)
    digests = sums.verified(listed, signature, public_key)
    return Release(version, name, digests[name], f"{folder}/{name}")


def download(releases: str, release: Release, out: BinaryIO) -> None:
    """Write the release's executable to `out`.  Raises UpdateFailed, and OSError of `out`."""
    digest = hashlib.sha256()
    with _client(releases) as client:
        for part in _content(client, release.url, MAX_EXECUTABLE_BYTES):
            out.write(part)
            digest.update(part)
    out.flush()
    os.fsync(out.fileno())
    if digest.hexdigest() != release.digest:
        raise UpdateFailed(
            f"{release.name} is not the file that was released, or not all of it arrived: its "
            "SHA-256 differs from the signed one.  Nothing was changed; try again."
        )


def _find(listed: bytes, variant: str, releases: str) -> tuple[str, str]:
    """The version and the name of the executable for this machine.  What is not verified yet is
    used for nothing but to find the signature."""
    system = f"{platform.system().lower()}-{platform.machine()}"
    ending = f"{system}-{variant}" if variant else system
    pattern = rf"[0-9a-f]{{64}} [ *](pinaivu-({versions.PATTERN})-{re.escape(ending)})"
    lines = [re.fullmatch(pattern, line) for line in listed.decode("utf-8", "replace").split("\n")]
    found = [line for line in lines if line]
    if len(found) != 1:
        raise UpdateFailed(
            f"The newest release at {releases} has no executable for this one ({ending})."
            if not found
            else f"The newest release at {releases} names more than one version of {ending}."
        )
    return found[0][2], found[0][1]


def _client(releases: str) -> httpx.Client:
    """Whoever asked for HTTPS is led to HTTPS only."""

    def check(request: httpx.Request) -> None:
        if releases.startswith("https:") and request.url.scheme != "https":
            raise UpdateFailed(f"{releases} leads to {request.url.host} without TLS: not used.")

    return httpx.Client(
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=httpx.Timeout(_STALL_SECONDS, connect=_CONNECT_SECONDS),
        headers={"User-Agent": f"pinaivu-box/{pinaivu_box.__version__}"},
        event_hooks={"request": [check]},
    )


def _document(client: httpx.Client, url: str, max_bytes: int) -> bytes:
    return b"".join(_content(client, url, max_bytes))


def _content(client: httpx.Client, url: str, max_bytes: int) -> Iterator[bytes]:
    """Raises UpdateFailed."""
    size = 0
    with _explained(url), client.stream("GET", url) as response:
        if not response.is_success:
            raise UpdateFailed(f"{url} answers with {response.status_code}: nothing was changed.")
        for part in response.iter_bytes(_CHUNK_BYTES):
            size += len(part)
            if size > max_bytes:
                raise UpdateFailed(f"{url} is longer than it can be: nothing was changed.")
            yield part


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Raises UpdateFailed for what is wrong with the server or the way to it."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise UpdateFailed(f"{url} cannot be fetched ({reason}): nothing was changed.") from error
