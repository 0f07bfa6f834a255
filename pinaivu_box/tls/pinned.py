"""How commands on a home recognise its server: by the certificate that it shows, exactly.

The server writes that into the home, where only its owner reads and writes.  Names and the date do
not matter: commands reach it at whatever address `run.json` says, and an operator whose certificate
has expired must reach it most of all.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from pinaivu_box.errors import NotRunning

_SERVED = "tls/served.crt"
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the module ssl does not name


def publish(home: Path, pem: bytes) -> None:
    """Write the certificate that the server shows into its home."""
    path = home / _SERVED
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(".served.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
    temporary.replace(path)


def context_for(home: Path, url: str) -> ssl.SSLContext | bool:
    """The `verify` of httpx for the server of a home; False over plain HTTP, where there is nothing
    to verify.  Raises NotRunning if the home has no certificate."""
    return pinned_context(home) if url.startswith("https://") else False


def pinned_context(home: Path) -> ssl.SSLContext:
    """Raises NotRunning if the home has no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    try:
        pem = (home / _SERVED).read_text("ascii")
        context.load_verify_locations(cadata=_first(pem))
    except (OSError, ValueError) as error:
        raise NotRunning(
            f"The certificate of the server on {home} cannot be read: start the server again."
        ) from error
    return context


def _first(pem: str) -> str:
    """The server's own certificate of a chain: those of its issuers have signed others too."""
    end = "-----END CERTIFICATE-----"
    own, _, _ = pem.partition(end)
    return own[own.find("-----BEGIN") :] + end + "\n"
