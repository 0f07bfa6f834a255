"""How answers of `/v1/completions` name tokens, and the likeliest ones."""

from __future__ import annotations

from collections.abc import Iterable


def shown_token(token: bytes) -> str:
    """Parts of characters as OpenAI writes them here, so that each has a name of its own."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def shown_likeliest(
    token: bytes, logprob: float, top: Iterable[tuple[bytes, float]]
) -> dict[str, float]:
    """The likeliest ones and the token itself, each once."""
    found: dict[str, float] = {}
    for name, value in [*top, (token, logprob)]:
        found.setdefault(shown_token(name), value)
    return found
