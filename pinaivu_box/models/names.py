"""What a model may be called, and how names that files and peers give are printed."""

from __future__ import annotations

import re

MAX_NAME = 128  # characters; what an advert has room for
# name:tag as in Ollama, with an optional owner before it.
WELL_FORMED = re.compile(r"(?:[\w.-]+/)*[\w.-]+(?::[\w.-]+)?", re.ASCII)
RULE = f"letters, digits, '.', '_' and '-', one ':' before a tag, at most {MAX_NAME} characters"


def is_model_id(text: str) -> bool:
    """Whether a model can be served, advertised and asked for under that name."""
    return len(text) <= MAX_NAME and WELL_FORMED.fullmatch(text) is not None


def spellings(model_id: str) -> tuple[str, str, str]:
    """The ids that a name may stand for, in the order in which they count: a name without a tag
    means `:latest`."""
    return model_id, f"{model_id}:latest", model_id.removesuffix(":latest")


def with_tag(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def printable(text: str, max_chars: int = 400) -> str:
    """The text in one line for a terminal, a log or JSON: what is not printable is escaped, as are
    the bytes of a file name that are not UTF-8, and what is longer than `max_chars` is cut."""
    cut = text if len(text) <= max_chars else f"{text[:max_chars]}…"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in cut)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # os.fsdecode's way to keep such a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
