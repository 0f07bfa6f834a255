"""Prints an answer while it comes: in whole words on a terminal, as it is elsewhere."""

from __future__ import annotations

import re
from typing import TextIO

from rich.cells import cell_len

from pinaivu_box.cli import colours

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"
_FENCE = "```"  # begins and ends code, whose lines are not broken
_PARTS = re.compile(r"\n| +|[^ \n]+")


class Printer:
    """Writes to `out`.  With a `width` that is a terminal: lines are broken between words,
    characters that would control it are left out, and reasoning is dim, where it may be; otherwise
    reasoning is left out."""

    def __init__(self, out: TextIO, width: int | None) -> None:
        self._out, self._width, self._styled = out, width, colours.are_wanted()
        self._column = 0
        self._line = ""  # as far as it has come from the model
        self._held = ""  # the beginning of a word, or blanks
        self._in_code = False
        self._dim = False
        self._began = False

    def reasoning(self, text: str) -> None:
        if self._width is not None:
            self._set_dim(True)
            self._take(text)

    def text(self, text: str) -> None:
        if self._dim:
            self._set_dim(False)
            text = f"\n\n{text.lstrip()}"
        self._take(text)

    def end(self) -> None:
        """End the last line, if there is one that has not ended."""
        self._release()
        self._set_dim(False)
        self._out.write("\n" if self._began else "")
        self._out.flush()
        self._began = False

    def _take(self, text: str) -> None:
        self._began = True
        if self._width is None:
            self._out.write(text)
        else:
            for part in _PARTS.findall(_printable(text)):
                self._add(part)
        self._out.flush()

    def _add(self, part: str) -> None:
        """A newline, blanks, or (some of) a word."""
        if part == "\n":
            self._release()
            self._out.write("\n")
            if self._line.lstrip().startswith(_FENCE):
                self._in_code = not self._in_code
            self._column, self._line = 0, ""
            return
        self._line += part
        if part.isspace() != self._held.isspace():
            self._release()
        self._held += part
        if self._in_code or self._line.lstrip().startswith(_FENCE):
            self._release()

    def _release(self) -> None:
        """Print what was held, in the next line if this one has no room for it."""
        cells = cell_len(self._held)
        if not self._in_code and self._width and 0 < self._column > self._width - cells:
            blank = self._held.isspace()
            self._out.write("" if blank else "\n")
            self._column = self._column if blank else 0
            self._held, cells = ("", 0) if blank else (self._held, cells)
        self._out.write(self._held)
        self._column += cells
        self._held = ""

    def _set_dim(self, dim: bool) -> None:
        if dim != self._dim:
            self._release()
            if self._styled:
                self._out.write(_DIM if dim else _NORMAL)
            self._dim = dim


def _printable(text: str) -> str:
    """Without what would move the cursor or change colours: a model may write anything."""
    return "".join(
        letter for letter in text if letter == "\n" or letter == "\t" or letter.isprintable()
    )
