"""Digests of model files, remembered: reading 40 GB at every start would take a minute."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pinaivu_box.models import partial_file
from pinaivu_box.models.catalog import Model, digest_of
from pinaivu_box.models.regular_files import look
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.store.database import Database, Statement

_AT_A_TIME = 3  # files that are read for the same box: others of its threads have work, too

T = TypeVar("T")
_Facts = tuple[str, int, int]


async def digest(database: Database, model: Model) -> str:
    """Its digest in hex (see `models.catalog.digest_of`), from memory while size and time of its
    files are unchanged.  Raises OSError."""
    if model.recorded_digest:
        return model.recorded_digest
    if model.parts:
        return digest_of_parts(await digests_of_parts(database, model))
    facts = _facts(model.path)
    rows = await database.read(
        "SELECT digest FROM model_files WHERE path = ? AND size = ? AND mtime_ns = ?", facts
    )
    if rows:
        return str(rows[0]["digest"])
    found = await _in_thread(lambda stopped: digest_of(model, stopped))
    await database.write(
        ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*facts, found)),
    )
    return found


async def digests_of_parts(database: Database, model: Model) -> list[str]:
    """SHA-256 in hex of each of its files.  Raises OSError."""
    return [await digest(database, file) for file in model.files]


class Digests:
    """The same, for what asks at each request: without the database once it is known, and once for
    all who ask at the same time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[_Facts, ...], str] = {}
        self._running: dict[tuple[_Facts, ...], asyncio.Task[str]] = {}
        self._places = asyncio.Semaphore(_AT_A_TIME)

    async def of(self, model: Model) -> str:
        """Raises OSError."""
        if model.recorded_digest:
            return model.recorded_digest
        facts = tuple(_facts(file.path) for file in model.files)
        if facts not in self._known:
            self._known[facts] = await self._find(facts, model)
        return self._known[facts]

    async def _find(self, facts: tuple[_Facts, ...], model: Model) -> str:
        """Whoever gives up waiting stops nothing that others wait for."""
        task = self._running.get(facts)
        if task is None:
            task = self._running[facts] = asyncio.create_task(self._read(model))
            task.add_done_callback(lambda _: self._running.pop(facts, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _read(self, model: Model) -> str:
        async with self._places:
            return await digest(self._database, model)

    async def close(self) -> None:
        """Stop reading."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def hashes(database: Database, model: Model, digest: str) -> bytes:
    """The SHA-256 of each of its pieces (`models.partial_file`), computed once for that digest; of
    a model in one file."""
    rows = await database.read("SELECT hashes FROM model_pieces WHERE digest = ?", (digest,))
    if rows:
        return bytes(rows[0]["hashes"])
    found = await _in_thread(lambda stopped: partial_file.hashes(model, stopped))
    await database.write(_keep(digest, found))
    return found


def copied(path: Path, digest: str, hashes: bytes) -> tuple[Statement, Statement]:
    """What is known of a file that was checked as it came: it need not be read again."""
    return _keep(digest, hashes), named(path, digest)


def named(path: Path, digest: str) -> Statement:
    """The same of another name of a file that is known."""
    return ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*_facts(path), digest))


async def _in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Do it beside the event loop; it is told when nobody waits for it any more, so that a large
    file does not hold up the end of the program."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(work, stop.is_set)
    finally:
        stop.set()


def _facts(path: Path) -> _Facts:
    """A file that has changed has others.  Raises OSError, also if it is no regular file."""
    found = look(path)
    # SQLite's integers end in the year 2262, file systems' later.
    return str(path), found.st_size, found.st_mtime_ns % 2**63


def _keep(digest: str, hashes: bytes) -> Statement:
    return ("INSERT OR REPLACE INTO model_pieces VALUES (?, ?)", (digest, hashes))
