"""How a model is asked for lasting facts about a user, and which of its answers count.

Only what the user wrote is looked at, never what a model answered.  Rules cut it into clauses and
leave those in which somebody says something of themselves; the model chooses among them, by a
grammar that allows nothing else.  So a fact is always in the user's own words, in any language, and
a small model can invent none.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import msgspec

from pinaivu_box.chats.memories import tidy, words_of
from pinaivu_box.chats.prompt import with_examples
from pinaivu_box.chats.said import without_quotations
from pinaivu_box.engine.messages import Constraint

MAX_TOKENS = 160
_MAX_FACTS = 3
_MIN_FACT, _MAX_FACT = 9, 150  # characters
_MAX_CLAUSES = 12  # that a model chooses among
_MAX_TEXT = 20_000  # characters: longer ones are texts to work on
_NONE = "none"
# A full stop within a word, a number or an address ends no sentence.
_SENTENCE = re.compile(r"(?:[^.!?;\n]|[.!?;](?=[^\s]))+[.!?;]?")
_CLAUSE_END = re.compile(
    r"(?<=[^0-9]), | [-–—] |,? (?:and|but|so|because) (?=(?:I|my)\b)",  # noqa: RUF001
    re.ASCII,
)
_JOINED = re.compile(
    r"^(?:and|but|so|because|well|also|hi|hello|hey|und|aber|et|mais|y|pero)\s+", re.I
)
# Who says something of themselves begins with one of these; before "I" there may be a word or two.
_I = frozenset("i we ich wir j je nous yo nosotros io noi eu nós ik wij".split())  # noqa: SIM905
_MY = frozenset(
    "my our mon ma mes notre mi mis mio mia meu minha mijn".split()  # noqa: SIM905
)
_MY_INFLECTED = ("mein", "unser")
# Behind it: what somebody wants, thinks or asks now.
_PASSING = frozenset(
    """
    can could should would shall will might must need want wonder wondering think guess mean hope
    know d ll get got tried try trying see saw forgot wish don didn doesn cannot please question
    kann könnte soll sollte würde möchte will brauche glaube denke weiß frage muss frag
    """.split()  # noqa: SIM905
)
_TODAY = frozenset(
    """
    today tonight tomorrow yesterday now just already heute gestern jetzt gerade eben
    """.split()  # noqa: SIM905
)
_INSTRUCTION = (
    "You choose what is worth remembering about a user.  You are given sentences of the user.  "
    "Repeat those that state a lasting fact about the user: name, work, family, home, health, "
    "habits, preferences, projects, devices.  Leave out what is only about today or about a task.  "
    f'If none is a lasting fact, answer "{_NONE}".'
)
# For small models, which do better by examples.
_EXAMPLES = (
    ("I was late this morning", _NONE),
    ("I'm Kim\nI teach physics in Oslo", "I'm Kim\nI teach physics in Oslo"),
    ("I have pasted the text below", _NONE),
    ("My cat has only three legs", "My cat has only three legs"),
    ("I read your last answer\nI do not eat meat", "I do not eat meat"),
)


def clauses(text: str) -> list[str]:
    """Where a user says something of themselves, in the user's words; the first ones."""
    if len(text) > _MAX_TEXT:
        return []
    found: list[str] = []
    for sentence in _SENTENCE.findall(without_quotations(text)):
        sentence = " ".join(sentence.split())  # many spaces would make the next pattern slow
        if sentence.endswith("?"):  # what stands before the question is said all the same
            *said, _ = _CLAUSE_END.split(sentence)
        else:
            said = _CLAUSE_END.split(sentence)
        found += [clause for one in said if (clause := _clause(one))]
    return list(dict.fromkeys(found))[:_MAX_CLAUSES]


def _clause(text: str) -> str:
    """Tidied, or empty if it says nothing of its writer that might last."""
    clause = tidy(_JOINED.sub("", text.strip(" \t.!;,:-–—*\"'“”„()")))  # noqa: RUF001
    words = words_of(clause)
    if words[:2] in (["i", "m"], ["i", "am"]) and len(words) == 3:  # as in "I'm Kim"
        return clause
    if not _MIN_FACT <= len(clause) <= _MAX_FACT or len(words) < 3 or _is_about_today(words):
        return ""
    if words[0] in _MY or words[0].startswith(_MY_INFLECTED):
        return clause
    place = next((place for place, word in enumerate(words[:3]) if word in _I), None)
    if place is None or len(words) < place + 3 or _PASSING & {*words[place + 1 : place + 3]}:
        return ""
    return clause


def _is_about_today(words: list[str]) -> bool:
    return bool(_TODAY & set(words)) or any(
        pair in (("this", "morning"), ("this", "week"), ("last", "night"))
        for pair in pairwise(words)
    )


def messages(text: str) -> list[dict[str, Any]]:
    """Of a text that has clauses."""
    return with_examples(_INSTRUCTION, _EXAMPLES, "\n".join(clauses(text)))


def constraint(text: str) -> Constraint:
    """That of an answer: some of the clauses of a text, one a line, or none."""
    fact = " | ".join(msgspec.json.encode(clause).decode() for clause in clauses(text))
    more = f'("\\n" fact){{0,{_MAX_FACTS - 1}}}'
    return Constraint("lark", f'start: "{_NONE}" | fact {more}\nfact: {fact}\n')


def facts_in(answer: str, text: str) -> list[str]:
    """The facts of a model's answer, which are clauses of the text."""
    known = clauses(text)
    chosen = dict.fromkeys(line.strip() for line in answer.split("\n"))
    return [fact for fact in chosen if fact in known][:_MAX_FACTS]
