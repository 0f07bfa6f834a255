"""Digests of model files, kept in the database: reading 40 GB at each start would take a minute."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pinaivu_box.models import partial_file
from pinaivu_box.models.catalog import Model, digest_of
from pinaivu_box.models.regular_files import stat_regular
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.tasks import ignore_exception

_MAX_READS = 3  # files read at a time: other work needs threads, too

T = TypeVar("T")
_Facts = tuple[str, int, int]


async def digest(database: Database, model: Model) -> str:
    """Return a model's digest in hex (see `models.catalog.digest_of`), from the database while size
    and time of its files are unchanged.  Raises OSError."""
    if model.recorded_digest:
        return model.recorded_digest
    if model.parts:
        return digest_of_parts(await digests_of_parts(database, model))
    facts = _facts(model.path)
    if stored := await _stored(database, facts):
        return stored
    computed = await _in_thread(lambda stopped: digest_of(model, stopped))
    await database.write(
        ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*facts, computed)),
    )
    return computed


async def known_digest(database: Database, model: Model) -> str:
    """Return a model's digest if no file has to be read for it, else ""."""
    if model.recorded_digest:
        return model.recorded_digest
    digests = [await _stored(database, _facts(file.path)) for file in model.files]
    if not all(digests):
        return ""
    return digest_of_parts(digests) if model.parts else digests[0]


async def _stored(database: Database, facts: _Facts) -> str:
    rows = await database.read(
        "SELECT digest FROM model_files WHERE path = ? AND size = ? AND mtime_ns = ?", facts
    )
    return str(rows[0]["digest"]) if rows else ""


async def digests_of_parts(database: Database, model: Model) -> list[str]:
    """Return the SHA-256 in hex of each of its files.  Raises OSError."""
    return [await digest(database, file) for file in model.files]


class Digests:
    """The same with a cache in memory, for use at each request.  Callers that ask at the same time
    share one read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[_Facts, ...], str] = {}
        self._running: dict[tuple[_Facts, ...], asyncio.Task[str]] = {}
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def of(self, model: Model) -> str:
        """Return the model's digest.  Raises OSError."""
        if model.recorded_digest:
            return model.recorded_digest
        facts = tuple(_facts(file.path) for file in model.files)
        if facts not in self._known:
            self._known[facts] = await self._read_once(facts, model)
        return self._known[facts]

    async def _read_once(self, facts: tuple[_Facts, ...], model: Model) -> str:
        """Read the files; a caller that is cancelled does not cancel it for the others."""
        task = self._running.get(facts)
        if task is None:
            task = self._running[facts] = asyncio.create_task(self._read(model))
            task.add_done_callback(lambda _: self._running.pop(facts, None))
            task.add_done_callback(ignore_exception)
        return await asyncio.shield(task)

    async def _read(self, model: Model) -> str:
        async with self._reads:
            return await digest(self._database, model)

    async def close(self) -> None:
        """Stop reading."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def hashes(database: Database, model: Model, digest: str) -> bytes:
    """Return the SHA-256 of each piece (`models.partial_file`) of a model in one file.

    They are computed once for that digest.
    """
    rows = await database.read("SELECT hashes FROM model_pieces WHERE digest = ?", (digest,))
    if rows:
        return bytes(rows[0]["hashes"])
    computed = await _in_thread(lambda stopped: partial_file.hashes(model, stopped))
    await database.write(_insert_hashes(digest, computed))
    return computed


def copied(path: Path, digest: str, hashes: bytes) -> tuple[SqlStatement, SqlStatement]:
    """Return statements that store what is known of a downloaded file, so that it is not read
    again."""
    return _insert_hashes(digest, hashes), named(path, digest)


def named(path: Path, digest: str) -> SqlStatement:
    """Return the statement that stores the digest of a file under another name."""
    return ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*_facts(path), digest))


async def _in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run work in a thread.  It can ask whether it should stop, since nobody waits for it any more:
    so a large file does not delay the end of the program."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(work, stop.is_set)
    finally:
        stop.set()


def _facts(path: Path) -> _Facts:
    """Return what changes with a file.  Raises OSError, also if it is not a regular file."""
    status = stat_regular(path)
    # SQLite's integers end in the year 2262, file systems' later.
    return str(path), status.st_size, status.st_mtime_ns % 2**63


def _insert_hashes(digest: str, hashes: bytes) -> SqlStatement:
    return ("INSERT OR REPLACE INTO model_pieces VALUES (?, ?)", (digest, hashes))
