"""How answers of `/v1/completions` write tokens and their alternatives."""

from __future__ import annotations

from collections.abc import Iterable


def shown_token(token: bytes) -> str:
    """The text of a token; a part of a character is written as OpenAI does (`bytes:\\xf0`), so that
    different tokens have different names."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def shown_likeliest(
    token: bytes, logprob: float, top: Iterable[tuple[bytes, float]]
) -> dict[str, float]:
    """The log-probabilities of the likeliest tokens and the token itself, each once."""
    by_name: dict[str, float] = {}
    for other, value in [*top, (token, logprob)]:
        by_name.setdefault(shown_token(other), value)
    return by_name
