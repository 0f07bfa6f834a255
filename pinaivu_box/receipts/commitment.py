"""Commitments to a prompt and an output: they bind without revealing.

commitment = SHA-256("pinaivu/commitment/v1\\n" + nonce + SHA-256(text) + SHA-256(token ids)), where
the nonce is 32 random bytes, the text is UTF-8 and the token ids are little-endian u32.  A receipt
may be public: without the nonce even a short prompt cannot be guessed from it.  With the opening,
the owner proves the text alone, and an auditor who has the tokens proves those too.

Several prompts of one request have a commitment each; the request's is SHA-256 over
"pinaivu/commitments/v1\\n" and theirs, in their order.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

_DOMAIN = b"pinaivu/commitment/v1\n"
_LIST_DOMAIN = b"pinaivu/commitments/v1\n"


class Opening(Struct, frozen=True):
    """What the owner of the key gets to open a commitment; hex."""

    nonce: str
    tokens_sha256: str


def new_nonce() -> str:
    return secrets.token_hex(32)


def commit(text: str, tokens: Sequence[int], nonce: str) -> tuple[str, Opening]:
    """The commitment in hex, and its opening."""
    opening = Opening(nonce, tokens_sha256(tokens))
    return recompute(text, opening), opening


def of_several(commitments: Sequence[str]) -> str:
    """One commitment stands for itself."""
    if len(commitments) == 1:
        return commitments[0]
    joined = b"".join(bytes.fromhex(one) for one in commitments)
    return hashlib.sha256(_LIST_DOMAIN + joined).hexdigest()


class Running:
    """The commitment to an output that is still growing."""

    def __init__(self, nonce: str) -> None:
        self.nonce = nonce
        self._text, self._tokens = hashlib.sha256(), hashlib.sha256()

    def add(self, text: str, tokens: Sequence[int]) -> None:
        self._text.update(text.encode())
        self._tokens.update(struct.pack(f"<{len(tokens)}I", *tokens))

    @property
    def opening(self) -> Opening:
        return Opening(self.nonce, self._tokens.hexdigest())

    @property
    def commitment(self) -> str:
        message = _DOMAIN + bytes.fromhex(self.nonce) + self._text.digest() + self._tokens.digest()
        return hashlib.sha256(message).hexdigest()


def recompute(text: str, opening: Opening) -> str:
    """The commitment in hex that `text` and `opening` lead to."""
    message = (
        _DOMAIN
        + bytes.fromhex(opening.nonce)
        + hashlib.sha256(text.encode()).digest()
        + bytes.fromhex(opening.tokens_sha256)
    )
    return hashlib.sha256(message).hexdigest()


def tokens_sha256(tokens: Sequence[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens)).hexdigest()


def prompt_text(messages: list[dict[str, Any]], stop: list[str], **more: Any) -> str:
    """The text that a prompt's commitment covers: RFC 8785 JSON of what the client asked."""
    return _canonical({"messages": messages, "stop": stop, **more})


def output_text(choices: list[str]) -> str:
    """The text that an output's commitment covers: of several choices, RFC 8785 JSON."""
    return choices[0] if len(choices) == 1 else _canonical(choices)


def _canonical(value: Any) -> str:
    """RFC 8785 of texts, whole numbers, lists and objects with ASCII names: of those msgspec writes
    the same bytes as `rfc8785`, a hundred times faster, and prompts can be long."""
    return msgspec.json.encode(value, order="sorted").decode()
