"""Commitments to a prompt and an output: they bind without revealing.

Of a prompt, and of an output in version 1:

    SHA-256("pinaivu/commitment/v1\\n" + nonce + SHA-256(text) + SHA-256(token ids))

and of an output in version 2:

    SHA-256("pinaivu/commitment/v2\\n" + nonce + SHA-256(text) + SHA-256(token ids)
            + digest of the log-probabilities + digest of the vectors)

and in version 3, which is for legs at upstreams, whose token ids are not known here:

    SHA-256("pinaivu/commitment/v3\\n" + nonce + SHA-256(text))  of a prompt
    SHA-256("pinaivu/commitment/v3\\n" + nonce + SHA-256(text)
            + digest of the log-probabilities + digest of the vectors)  of an output

The nonce is 32 random bytes, the text is UTF-8 and the token ids are little-endian u32; the
canonical bytes of the rest are in `docs/receipts.md`.  A receipt may be public: without the nonce
even a short prompt cannot be guessed from it.  With the opening, the owner proves each part that it
holds (text, log-probabilities, vectors), and an auditor who has the tokens proves those too.

Several prompts of one request have a commitment each; the request's is SHA-256 over
"pinaivu/commitments/v1\\n" and theirs, in their order.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.text import DIGEST, whole

OUTPUT_VERSION = 2
TEXT_VERSION = 3  # tokens are not known
_DOMAIN = b"pinaivu/commitment/v1\n"
_OUTPUT_DOMAIN = b"pinaivu/commitment/v2\n"
_TEXT_DOMAIN = b"pinaivu/commitment/v3\n"
_LIST_DOMAIN = b"pinaivu/commitments/v1\n"
_NONE = struct.Struct("<B")
_NUMBER = struct.Struct("<Bd")
_LENGTH = struct.Struct("<I")


OpenedDigest = Annotated[str, Meta(pattern=DIGEST)]
OpenedPart = Annotated[str, Meta(pattern=whole("([0-9a-f]{64})?"))]


class Opening(Struct, frozen=True, omit_defaults=True):
    """What the owner of the key gets to open a commitment; hex.  Those of an output in version 2
    have all of it, so that each part can be proven alone; in version 3 there are no tokens.

    Each part has 32 bytes when it is read: with other lengths, one commitment would have several
    openings, as of another text whose bytes are those of the tokens.
    """

    nonce: OpenedDigest
    tokens_sha256: OpenedPart = ""
    text_sha256: OpenedPart = ""
    logprobs_sha256: OpenedPart = ""
    vectors_sha256: OpenedPart = ""


def new_nonce() -> str:
    return secrets.token_hex(32)


def commit(
    text: str, tokens: Sequence[int] | None, nonce: str, choices: Sequence[Extras] = ()
) -> tuple[str, Opening]:
    """The commitment in hex, and its opening.  That to an output in version 2 also covers the
    extras of its `choices`.  Where tokens are not known (None) it is of version 3."""
    digest = hashlib.sha256(text.encode()).digest()
    tokens_digest = "" if tokens is None else tokens_sha256(tokens)
    opening = _opening(nonce, digest, tokens_digest, choices)
    return _commitment(opening, digest), opening


def of_several(commitments: Sequence[str]) -> str:
    """One commitment stands for itself."""
    if len(commitments) == 1:
        return commitments[0]
    joined = b"".join(map(bytes.fromhex, commitments))
    return hashlib.sha256(_LIST_DOMAIN + joined).hexdigest()


class Extras:
    """Digests of what an answer holds beside text and tokens, while it comes: the log-probabilities
    of one choice (`logprob_record` of each token) and the vectors (little-endian float32)."""

    def __init__(self) -> None:
        self._logprobs, self._vectors = hashlib.sha256(), hashlib.sha256()

    def copy(self) -> Extras:
        """One that goes on from here by itself."""
        other = Extras()
        other._logprobs, other._vectors = self._logprobs.copy(), self._vectors.copy()
        return other

    def add(self, records: Iterable[bytes], vectors: Iterable[bytes] = ()) -> None:
        for record in records:
            self._logprobs.update(record)
        for vector in vectors:
            self._vectors.update(_LENGTH.pack(len(vector) // 4) + vector)

    @property
    def logprobs(self) -> bytes:
        return self._logprobs.digest()

    @property
    def vectors(self) -> bytes:
        return self._vectors.digest()


class RunningCommitment:
    """The commitment to an output that is still growing, as proofs of that version have it."""

    def __init__(self, nonce: str, version: int = OUTPUT_VERSION) -> None:
        self.nonce = nonce
        self.version = version
        self._text, self._tokens = hashlib.sha256(), hashlib.sha256()
        self._extras = Extras()

    def add(
        self,
        text: str,
        tokens: Sequence[int],
        records: Iterable[bytes] = (),
        vectors: Iterable[bytes] = (),
    ) -> None:
        self._text.update(text.encode())
        self._tokens.update(struct.pack(f"<{len(tokens)}I", *tokens))
        if self.version > 1:
            self._extras.add(records, vectors)

    @property
    def opening(self) -> Opening:
        choices = [self._extras] if self.version > 1 else []
        tokens = self._tokens.hexdigest() if self.version < TEXT_VERSION else ""
        return _opening(self.nonce, self._text.digest(), tokens, choices)

    @property
    def commitment(self) -> str:
        return _commitment(self.opening, self._text.digest())


def _opening(nonce: str, text: bytes, tokens: str, choices: Sequence[Extras]) -> Opening:
    if not choices:
        return Opening(nonce, tokens)
    return Opening(
        nonce,
        tokens,
        text.hex(),
        of_choices([choice.logprobs for choice in choices]),
        # Only a request for vectors has any, and it has one choice.
        choices[0].vectors.hex(),
    )


def _commitment(opening: Opening, text: bytes) -> str:
    message = bytes.fromhex(opening.nonce) + text + bytes.fromhex(opening.tokens_sha256)
    domain = _DOMAIN
    if opening.vectors_sha256:
        message += bytes.fromhex(opening.logprobs_sha256) + bytes.fromhex(opening.vectors_sha256)
        domain = _OUTPUT_DOMAIN
    if not opening.tokens_sha256:
        domain = _TEXT_DOMAIN
    return hashlib.sha256(domain + message).hexdigest()


def logprob_record(
    token: bytes, logprob: float | None, top: Iterable[tuple[bytes, float | None]]
) -> bytes:
    """Of one token: its bytes, its log-probability as the answer has it, and the likeliest ones."""
    likeliest = [_bytes(name) + _number(value) for name, value in top]
    head = _bytes(token) + _number(logprob) + _LENGTH.pack(len(likeliest))
    return head + b"".join(likeliest)


def named_record(token: str, logprob: float | None, top: Mapping[str, float | None]) -> bytes:
    """The same for an answer that names tokens: in UTF-8, the likeliest ones in the order of it."""
    likeliest = sorted((name.encode(), value) for name, value in top.items())
    return logprob_record(token.encode(), logprob, likeliest)


def _bytes(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _number(value: float | None) -> bytes:
    """JSON writes what is not finite as null."""
    if value is None or not math.isfinite(value):
        return _NONE.pack(0)
    return _NUMBER.pack(1, value)


def of_choices(digests: Sequence[bytes]) -> str:
    """Of the log-probabilities of all choices: SHA-256 over the digests of each, in hex."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def recompute(text: str, opening: Opening) -> str:
    """The commitment in hex that `text` and `opening` lead to.  Raises ValueError."""
    return _commitment(opening, hashlib.sha256(text.encode()).digest())


def reopen(opening: Opening) -> str:
    """The commitment that an opening of an output leads to by itself, since version 2.  Raises
    ValueError."""
    return _commitment(opening, bytes.fromhex(opening.text_sha256))


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
