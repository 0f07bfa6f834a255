"""Finds reasoning and tool calls in the text of an answer, while it arrives.

Text that may be the beginning of a marker is held back until that is known; everything else is
returned at once, also the arguments of a call, so that deltas can be streamed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pinaivu_box.chat_format import THINK, THOUGHT, Style, overlap
from pinaivu_box.engine.messages import Output
from pinaivu_box.openai.tools import custom_input
from pinaivu_box.text import encodable


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ParsedCall:
    """The beginning of a tool call; its arguments follow."""

    index: int
    id: str
    name: str
    custom: bool = False


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of call `index`, as JSON; of a custom tool the whole text."""

    index: int
    text: str
    custom: bool = False


Piece = Text | Reasoning | ParsedCall | Arguments


class _Parsed:
    """What no frame holds; see ParsedOutput."""

    pieces: Sequence[Piece] = ()


class ParsedOutput(_Parsed, Output):
    """Output of a server that tells text, thoughts and calls apart itself: these are its `pieces`,
    and `text` writes them as a model would.  A call's ids and number count for nothing here."""


_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_HEAD_CHARACTERS = 4096  # it is matched again at every token


class Reader:
    """Reads one answer.

    `style` is how the model writes calls.  Only calls of the functions `names` count, of which
    `custom_tools` are custom tools.  With `thinks` reasoning is found too; with `thinking` the text
    begins inside it.
    """

    def __init__(
        self,
        style: Style | None,
        names: Collection[str] = (),
        *,
        custom_tools: Collection[str] = (),
        thinks: bool = False,
        thinking: bool = False,
    ) -> None:
        self.finish_reason = ""  # once the answer has ended
        self._style = style
        self._names = names
        self._custom_tools = custom_tools
        self._custom: str | None = None  # arguments so far of a call to a custom tool
        self._buffer = ""
        self._calls = 0
        self._blank = True  # only white space since the beginning, or since the last call
        self._held = ""  # the white space before a possible call
        self._depth, self._in_string, self._escaped = 0, False, False
        self._looked_at, self._ended = 0, False
        self._state: Callable[[bool], list[Piece]] = self._text
        # Whether all text is an answer's: there is nothing to look for.
        self.passes = style is None and not (thinks or thinking)
        if thinking:
            self._state = self._reasoning
        elif thinks:
            self._state = self._before_reasoning

    def read(self, output: Output) -> list[Piece]:
        """The next output of the answer; returns what is new."""
        if not isinstance(output, ParsedOutput):
            return self.take(output.text, output.finish_reason)
        pieces = [new for piece in output.pieces for new in self._parsed(piece)]
        if output.finish_reason is not None:
            pieces += self._arguments_of_call("", end=True)
            self._finish(output.finish_reason)
        return pieces

    def _parsed(self, piece: Piece) -> list[Piece]:
        """A piece that needs no reading, with what it ends."""
        if isinstance(piece, Arguments):
            return self._arguments_of_call(piece.text, end=False)
        before = self._arguments_of_call("", end=True)
        return [*before, self._call(piece.name) if isinstance(piece, ParsedCall) else piece]

    def _finish(self, reason: str) -> None:
        called = self._calls > 0 and reason == "stop"
        self.finish_reason = "tool_calls" if called else reason

    def take(self, text: str, finish_reason: str | None = None) -> list[Piece]:
        """More of the answer, the last of it if there is a finish reason; returns what is new."""
        if self._style is None and not self._buffer and self._state == self._text:
            pieces: list[Piece] = [Text(text)] if text else []  # nothing to look for
        else:
            self._buffer += text
            pieces = self._read(end=finish_reason is not None)
        if finish_reason is not None:
            self._finish(finish_reason)
        return pieces

    def _read(self, *, end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            state, size = self._state, len(self._buffer)
            pieces += state(end)
            if self._state == state and len(self._buffer) == size:
                return pieces  # the rest has to wait

    # -- states: each consumes what it can of the buffer -------------------------------------------

    def _before_reasoning(self, end: bool) -> list[Piece]:
        start = self._buffer.lstrip()
        if start.startswith(THINK):
            self._buffer = start.removeprefix(THINK)
            self._state = self._reasoning
        elif end or not THINK.startswith(start):
            self._state = self._text
        return []

    def _reasoning(self, end: bool) -> list[Piece]:
        reasoning, marker, rest = self._buffer.partition(THOUGHT)
        if marker:
            self._buffer = rest
            self._state = self._after_reasoning
        else:
            keep = 0 if end else overlap(reasoning, THOUGHT)
            split = len(reasoning) - keep
            reasoning, self._buffer = reasoning[:split], reasoning[split:]
        return [Reasoning(reasoning)] if reasoning else []

    def _after_reasoning(self, end: bool) -> list[Piece]:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer or end:
            self._state = self._text
        return []

    def _text(self, end: bool) -> list[Piece]:
        style = self._style
        text, trigger, keep = self._buffer, "", 0
        if style is not None and style.trigger:
            text, trigger, rest = self._buffer.partition(style.trigger)
            keep = 0 if end or trigger else overlap(text, style.trigger)
        elif style is not None and self._blank and text.lstrip().startswith("{"):
            self._state = self._head
            return []
        text, tail = text[: len(text) - keep], text[len(text) - keep :]
        if style is not None and self._blank and not text.strip():
            # White space before a call, or between two, is dropped; before text it is part of it.
            if not trigger and not end:
                return []
            self._held = text if trigger and not self._calls else ""
            text = "" if trigger or self._calls else text
        self._buffer = rest if trigger else tail
        if trigger:
            self._state = self._head
        if not text:
            return []
        self._blank = False
        return [Text(text)]

    def _head(self, end: bool) -> list[Piece]:
        trigger = self._style.trigger if self._style else ""
        opening = self._style.opening.removeprefix(trigger) if self._style else ""
        rest = self._buffer.lstrip().removeprefix(opening)
        head = _HEAD.match(rest[:_MAX_HEAD_CHARACTERS])
        # Decoded once it is complete: decoding at every token would take quadratic time.
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
            return [self._call(name), *self._arguments_of_call(arguments, end=True)]
        if head or whole or end or not (rest == "" or rest.startswith(("{", "["))):
            # It is not a call.
            text, self._buffer, self._held = self._held + trigger + self._buffer, "", ""
            self._blank, self._state = False, self._text
            self._forget_value()
            return [Text(text)]
        return []

    def _has_ended(self, value: str) -> bool:
        """Whether the JSON object or list at the beginning of `value` ends in what was added since
        the last call of this method."""
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
        text, self._buffer = self._buffer[:size], self._buffer[size or len(self._buffer) :]
        return self._arguments_of_call(text, end=end or size is not None)

    def _arguments_of_call(self, text: str, *, end: bool) -> list[Piece]:
        """More arguments of the last call; with `end` they are complete."""
        if self._custom is None:
            return [Arguments(self._calls - 1, text)] if text else []
        self._custom += text
        if not end:
            return []
        text, self._custom = custom_input(self._custom), None
        return [Arguments(self._calls - 1, text, custom=True)] if text else []

    def _value_ends(self, text: str) -> int | None:
        """The position in `text` where the current JSON value ends; None if it does not."""
        for position, character in enumerate(text):
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
                    return position + 1
        return None

    def _closing_brace(self, end: bool) -> list[Piece]:
        rest = self._buffer.lstrip()
        if rest.startswith("}"):
            self._buffer = rest[1:]
        if rest or end:
            self._state = self._tail
        return []

    def _tail(self, end: bool) -> list[Piece]:
        """After a call: its end marker, the next call of a list, or the end of the list."""
        rest = self._buffer.lstrip()
        after = self._style.after.strip() if self._style else ""
        if after:
            if after.startswith(rest) and rest != after:
                # At the end of the answer it is a truncated marker, which is not text.
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
        self._blank = bool(self._style and self._style.trigger)  # without a trigger: one call
        custom = name in self._custom_tools
        self._custom = "" if custom else None
        return ParsedCall(self._calls - 1, f"call_{secrets.token_hex(12)}", name, custom)


def _string(text: str) -> str:
    """A JSON string decoded; "" if it is invalid."""
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _object(text: str) -> tuple[str, str, int] | None:
    """The name in the JSON object at the beginning of `text`, its arguments as JSON and its length;
    None if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if not isinstance(value, dict):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    name = value.get("name")
    return name if isinstance(name, str) else "", encodable(arguments), end
