"""Memories that the user asks for in so many words: "remember that ...", "forget that ...".

Exact rules, in English and German, on what the user writes; they need no model.  A sentence has to
begin so: what stands in quotations, code or the middle of a sentence is not meant.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pinaivu_box.text import END

_MAX_CHARACTERS = 20_000  # of a message that is looked at: longer ones are texts to work on
_MAX_SENTENCE = 700  # characters: a memory's, and the words before it
# No word of these can be read in two ways, and they are few: else a long sentence takes for ever.
_PLEASE = r"(?:(?:please|kindly|and|also|ok|okay|hi|hello|hey)[, ]+|(?:can|could) you ){0,6}"
_BITTE = r"(?:(?:bitte|und|auch|ok|okay|hallo|hi)[, ]+|kannst du (?:dir )?){0,6}"
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?=\S)[^.!?\n]*)*")
_FENCE = re.compile(rf"```.*?(?:```|{END})|^>[^\n]*|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def _rule(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_REMEMBER = (
    _rule(_PLEASE + r"(?:remember|don'?t forget|note|keep in mind)"
        r"(?: this)?(?: that|:)\s+(?P<what>.+)"),
    _rule(
        _BITTE
        + r"(?:merke? dir|denke? daran|vergiss nicht|behalte|merken)(?: bitte)?\s*(?:,\s*dass|:)\s+"
        r"(?P<what>.+)"
    ),
)  # fmt: skip
_ABOUT_ME = (
    _rule(_PLEASE + r"(?P<what>my (?:full |first |last )?name is \S.*)"),
    _rule(_PLEASE + r"(?P<what>(?:you can |please )?call me \S.{0,40})"),
    _rule(_BITTE + r"(?P<what>mein (?:vor|nach)?name ist \S.*)"),
    _rule(_BITTE + r"(?P<what>ich hei(?:ß|ss)e \S.*)"),
    _rule(_BITTE + r"(?P<what>nenn(?:e)? mich \S.{0,40})"),
)
_FORGET = (
    _rule(_PLEASE + r"forget(?: this)?(?: that|:)\s+(?P<what>.+)"),
    _rule(_PLEASE + r"forget(?: everything)? about\s+(?P<what>.+)"),
    _rule(_BITTE + r"vergiss(?: bitte)?\s*(?:,\s*dass|:)\s+(?P<what>.+)"),
    _rule(_BITTE + r"vergiss(?: bitte)?(?: alles)? über\s+(?P<what>.+)"),
)


class Said(NamedTuple):
    remember: list[str]
    forget: list[str]


def said_in(text: str) -> Said:
    """What a message asks to remember, and what to forget, in the user's words."""
    if len(text) > _MAX_CHARACTERS:
        return Said([], [])
    remember, forget = [], []
    for sentence in _SENTENCE.findall(without_quotations(text)):
        sentence = sentence.strip(" \t,;-*")[:_MAX_SENTENCE]
        if what := _first(_FORGET, sentence):
            forget.append(what)
        elif what := _first((*_REMEMBER, *_ABOUT_ME), sentence):
            remember.append(what[0].upper() + what[1:])
    return Said(remember, forget)


def without_quotations(text: str) -> str:
    """Without code and what is quoted: that is not what the user says."""
    return _FENCE.sub("\n", text)


def _first(rules: tuple[re.Pattern[str], ...], sentence: str) -> str:
    for rule in rules:
        if (found := rule.fullmatch(sentence)) is not None:
            return found["what"].strip(" \t,;:\"'“”„")
    return ""
