"""A secret from the environment or from a file that only its owner can read.

It has one way out, `reveal`: whatever prints, logs or compares what holds it shows nothing of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pinaivu_box.errors import CliError
from pinaivu_box.models.regular_files import open_regular

_MAX_BYTES = 16_384
_PLAIN = re.compile("[!-~]+")  # what an HTTP header can carry


class Secret:
    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def read_secret(
    what: str, variable: str, file: str, environ: Mapping[str, str] = os.environ
) -> Secret | None:
    """The value of an environment variable, or else the content of a file; None if neither is
    named.  `what` is the setting that needs it.  Raises CliError."""
    if variable:
        text = environ.get(variable, "").strip()
        if not text:
            raise CliError(f"{what}: the environment variable {variable} is not set, or empty.")
        return _checked(what, f"the environment variable {variable}", text)
    return _from_file(what, file) if file else None


def _from_file(what: str, name: str) -> Secret:
    try:
        with open_regular(Path(name).expanduser()) as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read(_MAX_BYTES + 1)
        text = data.decode().strip()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        why = getattr(error, "strerror", None) or "it is not text"
        raise CliError(f"{what}: the file {name} cannot be read: {why}.") from error
    if mode & 0o077:
        raise CliError(
            f"{what}: others can read the file {name} (its mode is {mode:o}): run "
            f"'chmod 600 {name}'."
        )
    if len(data) > _MAX_BYTES or not text:
        raise CliError(f"{what}: the file {name} is {'empty' if not text else 'too long'}.")
    return _checked(what, f"the file {name}", text)


def _checked(what: str, where: str, text: str) -> Secret:
    if not _PLAIN.fullmatch(text):
        raise CliError(
            f"{what}: what {where} holds is no key: it has spaces, line breaks or characters "
            "beyond ASCII in it."
        )
    return Secret(text)
