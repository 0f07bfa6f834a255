"""Beginnings of prompts that the operator has named: all may share what is computed of them.

A text counts where a prompt begins with it: a raw prompt, the system message of a chat, or its
first message if there is no system message.  What the model's template writes before it belongs to
it.  It counts whole or not at all, so nobody finds out by guessing how it goes on.  One in which a
control token is written counts in raw prompts only: in a chat it is text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from threading import Lock
from typing import Any

from pinaivu_box.engine.prefix_cache import PRIVATE, PrefixScope, common_prefix
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.errors import ApiError

_MARK = "\u2063\u2062mark\u2062\u2063"  # in no text
# A prompt's next characters may change a text's last tokens: only those count that these leave.
_CONTINUATIONS = ("", "\n", "\n\n", " ", " a", "a", "1", ".", ",", ")", '"', "<", "\t")
_TAIL_CHARACTERS = 256
_MAX_READ_SECONDS = 5.0  # what is not read by then is not recognised
_TOOLS = json.dumps(
    [{"name": _MARK, "description": _MARK, "parameters": {"type": "object", "properties": {}}}]
)
# What templates may write before the system message depends on these (see `server.jobs`).
_VARIABLES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False, "reasoning_effort": "low"},
    *(
        {"enable_thinking": True, "reasoning_effort": effort}
        for effort in ("low", "medium", "high")
    ),
)


class NamedPrefixes:
    """`texts` as a model's template and tokenizer write them.  Used by several threads.

    They are read when they are first needed, and anew each day: templates may write the date.
    """

    def __init__(
        self, texts: list[str], template: SandboxedTemplate, tokenize: Callable[[str], list[int]]
    ) -> None:
        self._texts, self._template, self._tokenize = texts, template, tokenize
        self._reading = Lock()
        self._day: date | None = None
        self._known: list[tuple[list[int], str]] = []  # with their scopes; the longest first

    def share(self, scope: str, tokens: list[int]) -> PrefixScope:
        """With whom a prompt of that scope shares: also a named beginning with all who have it,
        unless the scope is PRIVATE."""
        if not self._texts or scope == PRIVATE:
            return PrefixScope(scope)
        with self._reading:
            if self._day != (today := datetime.now(UTC).date()):
                self._day, self._known = today, self._read()
        for known, name in self._known:
            if tokens[: len(known)] == known:
                return PrefixScope(scope, len(known), name)
        return PrefixScope(scope)

    def _read(self) -> list[tuple[list[int], str]]:
        until = time.monotonic() + _MAX_READ_SECONDS
        prompts = {prompt for text in self._texts for prompt in self._prompts(text, until)}
        prefixes = {tuple(self._tokens(prompt)) for prompt in prompts}
        longest_first = sorted(map(list, filter(None, prefixes)), key=len, reverse=True)
        return [(prefix, f"named {_digest(prefix)}") for prefix in longest_first]

    def _prompts(self, text: str, until: float) -> Iterator[str]:
        """The prompts, up to the end of the text, that begin with it."""
        yield text
        system = {"role": "system", "content": text + _MARK}
        first = {"role": "user", "content": text + _MARK}
        then = {"role": "user", "content": "Hello"}
        for messages, functions, variables in itertools.product(
            ([system, then], [first]), (None, _TOOLS), _VARIABLES
        ):
            if time.monotonic() > until:
                return
            with suppress(ApiError):  # the template has no such messages
                prompt = "".join(self._template.parts(messages, functions, variables))
                before, mark, _ = prompt.partition(_MARK)
                if mark and before.endswith(text.strip()):  # else tools come first
                    yield before

    def _tokens(self, text: str) -> list[int]:
        """The tokens of the text that no continuation changes."""
        end = text[-_TAIL_CHARACTERS:]  # what comes next changes nothing before that
        whole = common = self._tokenize(end)
        for more in _CONTINUATIONS:
            common = common[: common_prefix(common, self._tokenize(end + more))]
        tokens = self._tokenize(text)
        return tokens[: len(tokens) - (len(whole) - len(common))]


def _digest(tokens: list[int]) -> str:
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()
