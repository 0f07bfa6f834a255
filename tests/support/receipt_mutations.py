"""Receipts with something changed in them, for those who verify."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import rfc8785

from pinaivu_box.identity import Identity
from pinaivu_box.receipts.receipt import PROOF_DOMAIN, UPSTREAM_DOMAIN
from tests.support import receipt_vectors as made

Path = list[str | int]
# In place of a value.  Raw JSON, since some of it is none that `json` writes.
ODD = (
    "null", "true", "0", "1", "2", "3", "-1", "-0", "1.0", "1e0", "1.5", "1e400", "-1e-400",
    str(2**53), str(2**64), str(-(2**63)), "9" * 400, '""', '"0"', '"x"', '"node_"', "[]", "{}",
    '[{}]', '{"a":1}', '"' + "x" * 257 + '"', '"' + "\U0001f98a" * 257 + '"', '"\\ud800"',
    '"\\ud83e\\udd8a"', '"a\\nb"', '"\\u0000"', '"it\'s"', '"\\"\'\\u200b"', '"1e-7"', '"1e6"',
    '"1000000.0000001"', '"-0"', '"0e999"', '"1e999"', '"\\u0661"', '"+1"', '" 1"',
    '"upstream, not executed by a box"', '"estimate"', "NaN", "Infinity", "01", "1.", "tru",
    f'"{"0" * 64}"', f'"{"f" * 128}"', '"2026-11-30T09:00:00Z"', f'"{made.PEER.node_id}"',
)  # fmt: skip
# In place of some characters of a proof of inclusion.
ODD_CHARACTERS = (
    "", "\n", " ", "0", "7", "=", "+", "/", "\u2014", "A", "\r", "\t", "\x7f", "\x85", "\x1c",
    "\ufeff", "\u2028", "\u3000", "\xe9", "\U0001d518", "\u0663", "\n\n", "index 3\n",
)  # fmt: skip
_MARKER = "\U0001f512changed"


def flips(document: bytes, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """The document with the lowest bit of the byte at each of the positions changed."""
    for at in positions:
        yield at, document[:at] + bytes([document[at] ^ 1]) + document[at + 1 :]


def rewritten(chance: random.Random) -> bytes:
    """A receipt in which one or two things were changed, signed anew by whoever signed before."""
    legs = chance.choice(
        (
            [made.proof()],
            [made.proof(), made.upstream_leg(choice=1)],
            [made.lost(mark=True), made.proof(leg=1)],
            [made.proof(), made.proof(made.PEER, choice=1)],
        )
    )
    fields = made.receipt(*legs)
    where = chance.choice(("receipt", "receipt", "proof", "proof", "view"))
    if where == "proof":
        number = chance.randrange(len(legs))
        statement: dict[str, Any] = msgspec.to_builtins(legs[number])
        domain = UPSTREAM_DOMAIN if "upstream" in statement else PROOF_DOMAIN
        signer = made.PEER if statement["node_id"] == made.PEER.node_id else made.OWN
        if statement.get("witness"):
            signer = made.OWN
        fields["proofs"][number] = _signed(_changed(statement, chance), domain, signer)
        return made.document(fields)
    if where == "receipt":
        return made.document_of_text(_changed(fields, chance), fields)
    opening = {"prompt": {"nonce": "0" * 64}, "legs": [{"nonce": "0" * 64}], "stop": []}
    view = json.loads(made.document(fields, opening=opening))
    return _changed(view, chance).encode()


def spoiled(text: str, chance: random.Random) -> str:
    """The text with a few characters replaced by odd ones, or by a piece from elsewhere in it."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        start = chance.randrange(len(text) + 1)
        end = start + chance.choice((0, 0, 1, 1, 2, 30))
        piece = text[chance.randrange(len(text) + 1) :][: chance.choice((1, 5, 60))]
        new = chance.choice((*ODD_CHARACTERS, piece, piece))
        text = text[:start] + new + text[end:]
    return text


def _signed(text: str, domain: str, signer: Identity) -> dict[str, str]:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return {"signed": text, "signature": ""}
    return {"signed": text, "signature": signer.sign(domain, data).hex()}


def _changed(fields: dict[str, Any], chance: random.Random) -> str:
    """The canonical text of these fields, with a change."""
    fields = json.loads(json.dumps(fields))
    path = chance.choice(list(_paths(fields)))
    parent: Any = fields
    for step in path[:-1]:
        parent = parent[step]
    last, kind = path[-1], chance.choice(("odd", "odd", "odd", "gone", "new", "twice", "other"))
    if kind == "gone":
        del parent[last]
    elif kind in ("new", "twice") and isinstance(parent, dict):
        parent[_MARKER] = 0
        name = str(last) if kind == "twice" else "new"
        return _text(fields).replace(f'"{_MARKER}"', json.dumps(name), 1)
    elif kind == "other":
        parent[last] = _near(parent[last])
    else:
        parent[last] = _MARKER
        return _text(fields).replace(f'"{_MARKER}"', chance.choice(ODD), 1)
    return _text(fields)


def _near(value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return [*value, *value] if isinstance(value, list) else value


def _paths(value: Any, path: Path | None = None) -> Iterator[Path]:
    path = path or []
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            yield from _paths(value[name], [*path, name])
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _paths(item, [*path, number])


def _text(fields: dict[str, Any]) -> str:
    return rfc8785.dumps(fields).decode()
