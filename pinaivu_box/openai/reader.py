"""Finds thoughts and tool calls in the text of an answer, as it comes.

What may be the beginning of a mark waits until it is known; everything else goes out at once, also
the arguments of a call, so that a stream of deltas is one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pinaivu_box.chat_format import THINK, THOUGHT, Style, overlap
from pinaivu_box.openai.tools import as_input
from pinaivu_box.text import encodable


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class ParsedCall:
    """The beginning of a tool call; its arguments follow, or what a custom tool is called with."""

    index: int
    id: str
    name: str
    custom: bool = False


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of call `index`'s arguments; of a custom tool's call the whole text."""

    index: int
    text: str
    custom: bool = False


Piece = Text | Thought | ParsedCall | Arguments

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LONGEST_HEAD = 4096  # characters; it is looked for at every token


class Reader:
    """Of one answer.  Calls are looked for that `style` writes, of functions with these `names`, of
    which `customs` are custom tools; with `thinks` also thoughts.  `thinking` says that the text
    begins in the middle of one."""

    def __init__(
        self,
        style: Style | None,
        names: Collection[str] = (),
        *,
        customs: Collection[str] = (),
        thinks: bool = False,
        thinking: bool = False,
    ) -> None:
        self._style = style
        self._names = names
        self._customs = customs
        self._custom: str | None = None  # so far the arguments of a custom tool's call
        self._buffer = ""
        self._calls = 0
        self._blank = True  # nothing but white space was said since the beginning, or the last call
        self._held = ""  # the white space before what may be a call
        self._depth, self._in_string, self._escaped = 0, False, False
        self._looked_at, self._ended = 0, False
        self._state: Callable[[bool], list[Piece]] = self._text
        if thinking:
            self._state = self._thought
        elif thinks:
            self._state = self._before_thought

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._calls > 0

    def push(self, text: str) -> list[Piece]:
        if self._style is None and not self._buffer and self._state == self._text:
            return [Text(text)]  # nothing to look for
        self._buffer += text
        return self._read(end=False)

    def end(self) -> list[Piece]:
        """The answer is complete: what waited goes out."""
        return self._read(end=True)

    def _read(self, *, end: bool) -> list[Piece]:
        found: list[Piece] = []
        while True:
            state, size = self._state, len(self._buffer)
            found += state(end)
            if self._state == state and len(self._buffer) == size:
                return found  # no more to be learned from it

    # -- states: each takes what it can from the buffer --------------------------------------------

    def _before_thought(self, end: bool) -> list[Piece]:
        start = self._buffer.lstrip()
        if start.startswith(THINK):
            self._buffer = start.removeprefix(THINK)
            self._state = self._thought
        elif end or not THINK.startswith(start):
            self._state = self._text
        return []

    def _thought(self, end: bool) -> list[Piece]:
        said, found, rest = self._buffer.partition(THOUGHT)
        if found:
            self._buffer = rest
            self._state = self._after_thought
        else:
            keep = 0 if end else overlap(said, THOUGHT)
            said, self._buffer = said[: len(said) - keep], said[len(said) - keep :]
        return [Thought(said)] if said else []

    def _after_thought(self, end: bool) -> list[Piece]:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer or end:
            self._state = self._text
        return []

    def _text(self, end: bool) -> list[Piece]:
        style = self._style
        said, found, keep = self._buffer, "", 0
        if style is not None and style.trigger:
            said, found, rest = self._buffer.partition(style.trigger)
            keep = 0 if end or found else overlap(said, style.trigger)
        elif style is not None and self._blank and said.lstrip().startswith("{"):
            self._state = self._head
            return []
        said, kept = said[: len(said) - keep], said[len(said) - keep :]
        if style is not None and self._blank and not said.strip():
            # White space before a call, or between two, is nobody's; before text it belongs to it.
            if not found and not end:
                return []
            self._held = said if found and not self._calls else ""
            said = "" if found or self._calls else said
        self._buffer = rest if found else kept
        if found:
            self._state = self._head
        if not said:
            return []
        self._blank = False
        return [Text(said)]

    def _head(self, end: bool) -> list[Piece]:
        trigger = self._style.trigger if self._style else ""
        opening = self._style.opening.removeprefix(trigger) if self._style else ""
        rest = self._buffer.lstrip().removeprefix(opening)
        head = _HEAD.match(rest[:_LONGEST_HEAD])
        # Decoded once it is complete: at every token that would take as long as all before it.
        whole = _object(rest) if head is None and self._has_ended(rest) else None
        if head is not None and (name := _string(head[1])) in self._names:
            self._buffer = rest[head.end() :]
            self._forget_value()
            self._state = self._arguments
            return [self._call(name)]
        if whole is not None and whole[0] in self._names:
            name, arguments, size = whole
            self._buffer, self._state = rest[size:], self._tail
            self._forget_value()
            return [self._call(name), *self._argued(arguments, end=True)]
        if head or whole or end or not (rest == "" or rest.startswith(("{", "["))):
            # It is no call after all.
            said, self._buffer, self._held = self._held + trigger + self._buffer, "", ""
            self._blank, self._state = False, self._text
            self._forget_value()
            return [Text(said)]
        return []

    def _has_ended(self, value: str) -> bool:
        """Whether the JSON object or list that `value` begins with ends in what has come since the
        last call."""
        if self._ended or not value.startswith(("{", "[")):
            return False
        self._ended = self._value_ends(value[self._looked_at :]) is not None
        self._looked_at = len(value)
        return self._ended

    def _forget_value(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self._looked_at, self._ended = 0, False

    def _arguments(self, end: bool) -> list[Piece]:
        size = self._value_ends(self._buffer)
        if size is not None:
            self._state = self._closing_brace
        said, self._buffer = self._buffer[:size], self._buffer[size or len(self._buffer) :]
        return self._argued(said, end=end or size is not None)

    def _argued(self, said: str, *, end: bool) -> list[Piece]:
        """More arguments of the last call; with `end` there are no more."""
        if self._custom is None:
            return [Arguments(self._calls - 1, said)] if said else []
        self._custom += said
        if not end:
            return []
        text, self._custom = as_input(self._custom), None
        return [Arguments(self._calls - 1, text, custom=True)] if text else []

    def _value_ends(self, text: str) -> int | None:
        """Where in `text` the JSON value ends that it goes on with, if it does."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None

    def _closing_brace(self, end: bool) -> list[Piece]:
        rest = self._buffer.lstrip()
        if rest.startswith("}"):
            self._buffer = rest[1:]
        if rest or end:
            self._state = self._tail
        return []

    def _tail(self, end: bool) -> list[Piece]:
        """After a call: its end mark, the next of a list, or the end of the list."""
        rest = self._buffer.lstrip()
        after = self._style.after.strip() if self._style else ""
        if after:
            if after.startswith(rest) and rest != after:
                # At the end it is a mark that was cut off, which is nobody's text.
                self._buffer = "" if end else self._buffer
                return []
            self._buffer = rest.removeprefix(after)
            self._state = self._text
        elif rest.startswith((",", "]")):
            self._buffer = rest[1:]
            self._state = self._head if rest[0] == "," else self._text
        elif rest or end:
            self._state = self._text
        return []

    def _call(self, name: str) -> ParsedCall:
        self._calls += 1
        self._held = ""
        self._blank = bool(self._style and self._style.trigger)  # without one there is one call
        custom = name in self._customs
        self._custom = "" if custom else None
        return ParsedCall(self._calls - 1, f"call_{secrets.token_hex(12)}", name, custom)


def _string(text: str) -> str:
    """The string that is written so in JSON; without one an empty one, which names no function."""
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _object(text: str) -> tuple[str, str, int] | None:
    """The name in the JSON object that `text` begins with, its arguments as text, and its length;
    None if it is not complete."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if not isinstance(value, dict):
            return None
        given = value.get("arguments", value.get("parameters", {}))
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    name = value.get("name")
    return name if isinstance(name, str) else "", encodable(arguments), end
