r"""Texts from outside: patterns that fit the whole of one, numbers in ASCII digits, and what UTF-8
cannot carry.

`$` also fits before a last newline, and `\Z` is Python's alone; `END` is read alike by Python and
by ECMA-262, the language of patterns in `/openapi.json`.  `\d`, `\w`, `str.isdigit` and `int` take
the digits of every script, so none of them is used on what others have written.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

END = r"(?![\s\S])"
_DIGITS = re.compile("[0-9]{1,18}")


def whole(pattern: str) -> str:
    """For `msgspec.Meta`, which searches: the pattern that fits nothing but a whole text."""
    return f"^(?:{pattern}){END}"


def number(text: str) -> int | None:
    """The number that 1 to 18 ASCII digits say, and nothing else; None if it is none."""
    return int(text) if _DIGITS.fullmatch(text) else None


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT or [IPv6]:PORT.  Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"'{address}' is not an address: write HOST:PORT")
    if (port_number := number(port)) is None:
        raise ValueError(f"'{address}' is not an address: '{port}' is not a port")
    return host.strip("[]"), port_number


def encodable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop at its end."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def utc_text(seconds: float) -> str:
    """A Unix time as RFC 3339 in UTC, with milliseconds."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def megabytes(size: float, decimals: int = 0) -> str:
    """A size in bytes as `1,234 MB`."""
    return f"{size / 1e6:,.{decimals}f} MB"


DIGEST = whole("[0-9a-f]{64}")  # also of a key: 32 bytes in hex, in the one spelling that counts
SIGNATURE = whole("[0-9a-f]{128}")
NODE_ID = whole("node_[0-9a-f]{64}")
REQUEST_ID = whole("req_[0-9a-z]{26}")
TIME = whole(  # UTC, as `utc_text` writes it
    "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{3})?Z"
)
NO_CONTROLS = whole(r"[^\x00-\x1f\x7f-\x9f]*")  # what is shown in lists moves no cursor
NAME = whole(r"[^\x00-\x1f\x7f-\x9f]+")
TOKEN_ID = whole("0|[1-9][0-9]{0,8}")  # as text, where JSON wants a key
