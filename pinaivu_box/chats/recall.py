"""Which memories a message is about: by vectors, or by words (BM25).

The index of words is a table of SQLite's FTS5 in memory, made for one search: nothing that was
opened stays.
"""

from __future__ import annotations

import math
import sqlite3
import struct
from operator import mul

from pinaivu_box.chats.memories import words_of
from pinaivu_box.openai.memories import Memory

MOST = 5  # memories in a prompt
_MAX_WORDS = 64  # of a message that are looked for
_LEAST_SIMILAR = 0.3
_OF_THE_BEST = 0.75  # as similar as the best is at least
# Words that say nothing of what a text is about.
_STOP_WORDS = frozenset(
    """
    a about an and any are as at be been but by can could did do does for from had has have he
    her him his how i if in is it its me might my no not of on or our please she should so
    some tell than that the their them then there these they this those to us was we were what
    when where which who why will with would you your remember know forget aber alle als also
    am an auch auf aus bei bin bis bist bitte da das dass dein dem den der des die dir doch du
    ein eine einem einen einer er es für hat haben hatte ich ihm ihn ihr im in ist ja kann
    kannst man mein meine meinem meinen meiner mich mir mit nach nicht noch oder sein seine
    sich sie sind so soll über um und uns von vor war was wenn wer wie wir wird wo zu zum zur
    warum weißt sag
    """.split()  # noqa: SIM905
)


def telling_words(text: str) -> list[str]:
    """The words that say what a text is about."""
    return [word for word in words_of(text) if word not in _STOP_WORDS]


def by_words(memories: list[Memory], text: str) -> list[Memory]:
    """At most MOST, the best first: those that share a word with the text which says something."""
    words = list(dict.fromkeys(telling_words(text)))
    if not words or not memories:
        return []
    index = sqlite3.connect(":memory:")
    try:
        index.execute(
            "CREATE VIRTUAL TABLE memory USING fts5(text,"
            " tokenize = 'porter unicode61 remove_diacritics 2')"
        )
        index.executemany(
            "INSERT INTO memory (rowid, text) VALUES (?, ?)",
            (
                (number, " ".join(telling_words(memory.text)))
                for number, memory in enumerate(memories, 1)
            ),
        )
        query = " OR ".join(f'"{word}"' for word in words[:_MAX_WORDS])
        rows = index.execute(
            "SELECT rowid FROM memory WHERE memory MATCH ? ORDER BY rank, rowid LIMIT ?",
            (query, MOST),
        )
        return [memories[number - 1] for (number,) in rows]
    finally:
        index.close()


def by_vectors(memories: list[tuple[Memory, bytes]], vector: bytes) -> list[Memory]:
    """At most MOST, the most similar first; those without a vector are passed over."""
    wanted = _floats(vector)
    scored = sorted(
        ((_similarity(wanted, _floats(own)), -number) for number, (_, own) in enumerate(memories)),
        reverse=True,
    )
    if not scored:
        return []
    least = max(_LEAST_SIMILAR, scored[0][0] * _OF_THE_BEST)
    return [memories[-number][0] for score, number in scored[:MOST] if score >= least]


def _floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def _similarity(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The cosine of their angle; 0 if they cannot be compared."""
    if len(one) != len(other) or not one:
        return 0.0
    lengths = math.sqrt(_product(one, one) * _product(other, other))
    return _product(one, other) / lengths if lengths else 0.0


def _product(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return float(sum(map(mul, one, other)))
