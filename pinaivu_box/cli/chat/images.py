"""Images in what is typed: paths of image files, which are sent as data URLs."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from pinaivu_box.errors import CliError

_KINDS = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
    ".gif": "image/gif",
}  # fmt: skip
_ENDINGS = "|".join(kind[1:] for kind in _KINDS)
# A path in quotes, or one without spaces but for those after a backslash, as a terminal writes a
# file that is dropped on it.
_PATH = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>[^"'\n]+\.(?:{_ENDINGS}))(?P=quote)"""
    rf"""|(?<!\S)(?P<plain>(?:\\.|[^\s\\"'])+\.(?:{_ENDINGS}))(?![^\s.,;:!?)])""",
    re.IGNORECASE,
)


def content_of(text: str) -> tuple[str | list[dict[str, Any]], list[Path]]:
    """Return the content of a message: the text, or with images its parts; and the files that it
    names.  Only files that exist count.  Raises CliError for one that cannot be read."""
    files: list[Path] = []

    def take(match: re.Match[str]) -> str:
        path = _file(match["quoted"] or re.sub(r"\\(.)", r"\1", match["plain"]))
        if path is None:
            return match[0]
        files.append(path)
        return ""

    rest = _PATH.sub(take, text)
    if not files:
        return text, []
    parts: list[dict[str, Any]] = [{"type": "text", "text": rest.strip()}]
    parts += [{"type": "image_url", "image_url": {"url": _data_url(file)}} for file in files]
    return parts, files


def begins_with_file(text: str) -> bool:
    """Whether the first word is the path of a file."""
    return _file(text.split()[0]) is not None


def _file(written: str) -> Path | None:
    try:
        path = Path(written).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _data_url(file: Path) -> str:
    """Raises CliError."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror or error}.") from error
    return f"data:{_KINDS[file.suffix.lower()]};base64,{base64.b64encode(data).decode()}"
