"""Digests of model files, remembered: reading 40 GB at every start would take a minute."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pinaivu_box.models import pieces
from pinaivu_box.models.catalog import Model, digest_of
from pinaivu_box.store.database import Database, Statement


async def digest(database: Database, model: Model) -> str:
    """SHA-256 of the model's GGUF in hex, from memory while size and time are unchanged."""
    if model.recorded_digest:
        return model.recorded_digest
    facts = _facts(model.path)
    rows = await database.read(
        "SELECT digest FROM model_files WHERE path = ? AND size = ? AND mtime_ns = ?", facts
    )
    if rows:
        return str(rows[0]["digest"])
    found = await asyncio.to_thread(digest_of, model)
    await database.write(
        ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*facts, found)),
    )
    return found


class Digests:
    """The same, for what asks at each request: without the database once it is known."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[str, int, int], str] = {}

    async def of(self, model: Model) -> str:
        if model.recorded_digest:
            return model.recorded_digest
        facts = _facts(model.path)
        if facts not in self._known:
            self._known[facts] = await digest(self._database, model)
        return self._known[facts]


async def hashes(database: Database, model: Model, digest: str) -> bytes:
    """The SHA-256 of each of its pieces (`models.pieces`), reckoned once for that digest."""
    rows = await database.read("SELECT hashes FROM model_pieces WHERE digest = ?", (digest,))
    if rows:
        return bytes(rows[0]["hashes"])
    found = await asyncio.to_thread(pieces.hashes, model)
    await database.write(_keep(digest, found))
    return found


def copied(path: Path, digest: str, hashes: bytes) -> tuple[Statement, Statement]:
    """What is known of a file that was checked as it came: it need not be read again."""
    return _keep(digest, hashes), named(path, digest)


def named(path: Path, digest: str) -> Statement:
    """The same of another name of a file that is known."""
    return ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*_facts(path), digest))


def _facts(path: Path) -> tuple[str, int, int]:
    """A file that has changed has others."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _keep(digest: str, hashes: bytes) -> Statement:
    return ("INSERT OR REPLACE INTO model_pieces VALUES (?, ?)", (digest, hashes))
