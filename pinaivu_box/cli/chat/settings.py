"""What can be set in a chat: the system prompt, and parameters of its requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pinaivu_box.cli.options import NONE
from pinaivu_box.errors import UsageError

_SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError
    return _SWITCHES[text.lower()]


def _format(text: str) -> dict[str, str]:
    if text != "json":
        raise ValueError
    return {"type": "json_object"}


# Name -> (reader of its value, what a value is, the field of a request).
_READERS: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "system": (str, "a text", ""),
    "temperature": (_number, "a number, such as 0.7", "temperature"),
    "top_p": (_number, "a number from 0 to 1", "top_p"),
    "top_k": (int, "a whole number", "top_k"),
    "min_p": (_number, "a number from 0 to 1", "min_p"),
    "repeat_penalty": (_number, "a number, such as 1.1", "repeat_penalty"),
    "seed": (int, "a whole number", "seed"),
    "max_tokens": (int, "a whole number", "max_tokens"),
    "stop": (lambda text: [text], "a text that ends an answer", "stop"),
    "think": (_switch, "on or off", "think"),
    "format": (_format, "json", "response_format"),
    "verbose": (_switch, "on or off", ""),
}
_OLLAMA_NAMES = {"num_predict": "max_tokens", "parameter": ""}


class TerminalSettings:
    """The values that were set, by name."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    def set(self, name: str, text: str) -> None:
        """Set a value from its text; `none` resets it.  Raises UsageError."""
        name = _OLLAMA_NAMES.get(name, name)
        if name not in _READERS:
            raise UsageError(f"'{name}' cannot be set; these can: {', '.join(_READERS)}.")
        if text == NONE:
            self._texts.pop(name, None)
            self._values.pop(name, None)
            return
        read, what, _ = _READERS[name]
        try:
            self._values[name] = read(text)
        except ValueError:
            raise UsageError(f"{name}: '{text}' is not {what}.") from None
        self._texts[name] = text

    @property
    def system(self) -> str:
        return str(self._values.get("system", ""))

    @property
    def verbose(self) -> bool:
        return bool(self._values.get("verbose"))

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request that follow from what was set."""
        return {
            field: self._values[name]
            for name, (_, _, field) in _READERS.items()
            if field and name in self._values
        }

    def lines(self) -> list[str]:
        """Return what can be set, and what was set."""
        return [
            f"{name:<15} {self._texts.get(name, f'({what})')}"
            for name, (_, what, _) in _READERS.items()
        ]
