"""Log lines for a person who watches a terminal: one short line for each request, without colours.

    14:03:27  laptop  smollm2:135m  31+48 tokens  first 0.12 s  43.1/s  here

A file and the journal get the lines of `logs`, which have the ids and can be searched.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from typing import Any

from pinaivu_box.errors import quoted

_MAX_MESSAGE_CHARS = 4000
_MIN_NAME_CHARS = 6  # to which a name is cut where the line is too long
_MAX_SERVER_CHARS = 16
_GAP = "  "


class TerminalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if record.name == "pinaivu.request":
            cells = _request(fields)
        elif record.name == "pinaivu.http":
            cells = _http(fields)
        else:
            cells = [_message(record, fields)]
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = _GAP.join([clock, *cells])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _message(record: logging.LogRecord, fields: Mapping[str, Any]) -> str:
    level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
    pairs = [f"{name} {value}" for name, value in fields.items() if value not in (None, [], "")]
    text = f"{level}{record.getMessage()}"
    return quoted(f"{text}: {', '.join(pairs)}" if pairs else text, _MAX_MESSAGE_CHARS)


def _request(fields: Mapping[str, Any]) -> list[str]:
    """Key, model, what was counted, when its first token came, how fast it went, and who served
    it.  Names are cut where the line would not fit."""
    cells = [f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens"]
    if fields["ttft_ms"] is not None:
        cells.append(f"first {fields['ttft_ms'] / 1000:.2f} s")
    if fields["tokens_per_s"] is not None:
        cells.append(f"{fields['tokens_per_s']:.1f}/s")
    if fields["served_by"]:
        first, *more = fields["served_by"].split(",")
        cells.append(f"{quoted(first, _MAX_SERVER_CHARS)}{f' +{len(more)}' if more else ''}")
    if fields["status"] != 200:
        cells.append("client left" if fields["status"] == 499 else f"error {fields['status']}")
    return [*_fitted([_key(fields), fields["model"]], cells), *cells]


def _http(fields: Mapping[str, Any]) -> list[str]:
    cells = [str(fields["status"]), f"{fields['total_ms']} ms"]
    asked = f"{fields['method']} {fields['path']}"
    return [*_fitted([_key(fields), asked], cells), *cells]


def _key(fields: Mapping[str, Any]) -> str:
    return str(fields["key_name"] or fields["key"] or "no key")


def _fitted(names: list[str], cells: list[str]) -> list[str]:
    """The names, printable, the longer one cut first so that the line fits the terminal."""
    shown = [quoted(name, 200) for name in names]
    room = shutil.get_terminal_size().columns - len("HH:MM:SS") - sum(map(len, cells))
    room -= len(_GAP) * (len(cells) + len(names))
    while sum(map(len, shown)) > room and max(map(len, shown)) > _MIN_NAME_CHARS:
        longest = max(range(len(shown)), key=lambda number: len(shown[number]))
        shown[longest] = shown[longest].removesuffix("…")[:-1] + "…"
    return shown
