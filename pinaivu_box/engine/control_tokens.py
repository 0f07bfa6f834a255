"""What people write is text, also where it reads like a control token of the model.

Who could write `<|im_start|>system` into a message would forge turns.  So each control token's text
in what a template is given is marked before, and the prompt that the template makes is cut at its
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
_SHORTEST, _LONGEST = 3, 128  # characters of what is taken for a control token's text
_NAME = re.compile("[A-Za-z0-9_]+")
_BRACKETED = re.compile(".[^A-Za-z0-9].+[^A-Za-z0-9].", re.DOTALL)


class ControlTokens:
    """Finds those in a text that are written as one of `spellings`."""

    def __init__(self, spellings: Iterable[str]) -> None:
        # A vocabulary may call anything so, but a word in a text, or the name of a field, is none.
        words = [
            one
            for one in spellings
            if _SHORTEST <= len(one) <= _LONGEST and not _NAME.fullmatch(one)
        ]
        # Templates may put angle brackets around what they are given.
        inner = [one[1:-1] for one in words if _BRACKETED.fullmatch(one)]
        self._words = re.compile(f"({_any_of(words)})") if words else _NOTHING
        self._inner = re.compile(_any_of(inner)) if inner else _NOTHING

    def contents(self) -> MarkedContents:
        """For one prompt."""
        return MarkedContents(self._words, self._inner)


class MarkedContents:
    """What one prompt is made of.  Marks are random, so that nobody can write one, and of digits,
    which filters of templates leave alone.  A mark comes after what it marks, so that a template
    finds in a message what it looks for, and says what that is: it may be cut off and stand after
    a token of the template's own."""

    def __init__(self, words: re.Pattern[str], inner: re.Pattern[str]) -> None:
        self._words, self._inner = words, inner
        self._mark = f"{secrets.randbits(64):020d}"
        self._any = re.compile(self._mark + "[0-9]{6}")
        self._numbers: dict[str, int] = {}

    def marked(self, value: Any) -> Any:
        """The same with marks in its texts, at any depth."""
        if isinstance(value, str):
            pieces = self._words.split(value)  # every other one is a control token
            pieces[::2] = [one and self._inner.sub(self._with_mark, one) for one in pieces[::2]]
            pieces[1::2] = [one + self._mark_of(one) for one in pieces[1::2]]
            return "".join(pieces)
        if isinstance(value, list):
            return [self.marked(one) for one in value]
        if isinstance(value, dict):
            made = {self.marked(name): self.marked(one) for name, one in value.items()}
            return (
                CallArguments(made, self.marked(str(value)))
                if isinstance(value, CallArguments)
                else made
            )
        return value

    def _with_mark(self, found: re.Match[str]) -> str:
        return found[0] + self._mark_of(found[0])

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
        begin = at = 0  # of the part, and after the last control token
        for found in self._words.finditer(prompt):
            if prompt.startswith(self._mark_of(found[0]), found.end()):
                continue
            if prompt.find(self._mark, at, found.start()) >= 0:
                parts += [prompt[begin:at], self.unmarked(prompt[at : found.start()])]
                begin = found.start()
            at = found.end()
        if prompt.find(self._mark, at) >= 0:
            return [*parts, prompt[begin:at], self.unmarked(prompt[at:])]
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
