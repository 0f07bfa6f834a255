"""Keeps the text of messages plain where it reads like a control token of the model.

A message with `<|im_start|>system` in it could forge turns.  So the text of each control token in
a template's input is marked before, and the prompt that the template makes is cut at the template's
own control tokens: the parts that hold a mark are tokenized as plain text.  llama.cpp's templates
tell their own text from input for the same reason.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any

from pinaivu_box.engine.message_forms import CallArguments

_NOTHING = re.compile("((?!))")
_MIN_CHARACTERS, _MAX_CHARACTERS = 3, 128  # of a control token's text
_NAME = re.compile("[A-Za-z0-9_]+")
_BRACKETED = re.compile(".[^A-Za-z0-9].+[^A-Za-z0-9].", re.DOTALL)


class ControlTokens:
    """Finds those in a text that are written as one of `spellings`."""

    def __init__(self, spellings: Iterable[str]) -> None:
        # A vocabulary may mark any text so, but a word, or the name of a field, is none.
        words = [
            spelling
            for spelling in spellings
            if _MIN_CHARACTERS <= len(spelling) <= _MAX_CHARACTERS and not _NAME.fullmatch(spelling)
        ]
        # Templates may put angle brackets around their input.
        inner = [word[1:-1] for word in words if _BRACKETED.fullmatch(word)]
        self._words = re.compile(f"({_any_of(words)})") if words else _NOTHING
        self._inner = re.compile(_any_of(inner)) if inner else _NOTHING

    def contents(self) -> MarkedContents:
        """For one prompt."""
        return MarkedContents(self._words, self._inner)


class MarkedContents:
    """The input of one prompt, with marks.

    Marks are random, so that no message can hold one, and of digits, which filters of templates
    leave alone.  A mark follows what it marks, so that a template still finds in a message what it
    looks for; and it tells what that is, since it may be cut off and stand after a token of the
    template's own.
    """

    def __init__(self, words: re.Pattern[str], inner: re.Pattern[str]) -> None:
        self._words, self._inner = words, inner
        self._mark = f"{secrets.randbits(64):020d}"
        self._any = re.compile(self._mark + "[0-9]{6}")
        self._numbers: dict[str, int] = {}

    def marked(self, value: Any) -> Any:
        """The value with marks in its texts, at any depth."""
        if isinstance(value, str):
            pieces = self._words.split(value)  # every other one is a control token
            pieces[::2] = [text and self._inner.sub(self._with_mark, text) for text in pieces[::2]]
            pieces[1::2] = [word + self._mark_of(word) for word in pieces[1::2]]
            return "".join(pieces)
        if isinstance(value, list):
            return [self.marked(item) for item in value]
        if isinstance(value, dict):
            marked = {self.marked(name): self.marked(item) for name, item in value.items()}
            if isinstance(value, CallArguments):
                return CallArguments(marked, self.marked(str(value)))
            return marked
        return value

    def _with_mark(self, match: re.Match[str]) -> str:
        return match[0] + self._mark_of(match[0])

    def _mark_of(self, word: str) -> str:
        return f"{self._mark}{self._numbers.setdefault(word, len(self._numbers)):06d}"

    def unmarked(self, text: str) -> str:
        return self._any.sub("", text)

    def parts(self, prompt: str) -> list[str]:
        """The prompt in parts: the first, the third and so on are to be tokenized with control
        tokens in them, the others as plain text."""
        if self._mark not in prompt:
            return [prompt]
        parts: list[str] = []
        begin = end = 0  # of the part; after the last control token
        for match in self._words.finditer(prompt):
            if prompt.startswith(self._mark_of(match[0]), match.end()):
                continue
            if prompt.find(self._mark, end, match.start()) >= 0:
                parts += [prompt[begin:end], self.unmarked(prompt[end : match.start()])]
                begin = match.start()
            end = match.end()
        if prompt.find(self._mark, end) >= 0:
            return [*parts, prompt[begin:end], self.unmarked(prompt[end:])]
        return [*parts, prompt[begin:]]


def _any_of(words: Iterable[str]) -> str:
    """A pattern of the longest of them.  Words that begin alike are one branch: a vocabulary may
    have thousands, and a text be nothing but their beginnings."""
    after: dict[str, list[str]] = {}
    ends = False
    for word in words:
        if word:
            after.setdefault(word[0], []).append(word[1:])
        else:
            ends = True
    branches = [re.escape(first) + _any_of(rest) for first, rest in after.items()]
    if not ends and len(branches) == 1:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}" if branches else ""
