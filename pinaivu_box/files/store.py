"""Digests of model files, kept in the database: reading 40 GB at each start would take a minute."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable
from pathlib import Path
from typing import Any, TypeVar

from pinaivu_box.models import partial_file
from pinaivu_box.models.catalog import Model, digest_of
from pinaivu_box.models.regular_files import stat_regular
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.tasks import ignore_exception

_MAX_READS = 3  # files read at a time: other work needs threads, too

T = TypeVar("T")
_Facts = tuple[str, int, int]


class Digests:
    """Digests of files and hashes of their pieces.  What is not known is read once, however many
    callers ask for it at the same time, and then stored."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[_Facts, ...], str] = {}
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def of(self, model: Model) -> str:
        """Return a model's digest in hex (see `models.catalog.digest_of`), which is read again if
        size or time of its files change.  Raises OSError."""
        if model.adapters:
            adapters = [await self.of(file) for file in model.adapter_files]
            return model.digest_from(await self.of(model.base), adapters)
        if model.recorded_digest:
            return model.recorded_digest
        facts = tuple(_facts(file.path) for file in model.files)
        if facts not in self._known:
            self._known[facts] = await self._read_once(facts, lambda: self._digest(model))
        return self._known[facts]

    async def known(self, model: Model) -> str:
        """Return the model's digest, "" if its files would have to be read for it.  Raises
        OSError."""
        if model.adapters:
            base = await self.known(model.base)
            adapters = [await self.known(file) for file in model.adapter_files]
            return model.digest_from(base, adapters) if base and all(adapters) else ""
        if model.recorded_digest:
            return model.recorded_digest
        digests = [await self._stored(_facts(file.path)) for file in model.files]
        if not all(digests):
            return ""
        return digest_of_parts(digests) if model.parts else digests[0]

    async def hashes(self, model: Model, digest: str) -> bytes:
        """Return the SHA-256 of each piece (`models.partial_file`) of a model in one file, which
        are those of that digest.  Raises OSError."""
        return await self._read_once(digest, lambda: self._hashes(model, digest))

    async def close(self) -> None:
        """Stop reading."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _read_once(self, key: Hashable, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A caller that is cancelled does not cancel it for the others."""

        async def bounded() -> T:
            async with self._reads:
                return await read()

        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(bounded())
            task.add_done_callback(lambda _: self._running.pop(key, None))
            task.add_done_callback(ignore_exception)
        return await asyncio.shield(task)

    async def _digest(self, model: Model) -> str:
        if model.parts:
            return digest_of_parts([await self._digest(file) for file in model.files])
        facts = _facts(model.path)
        if stored := await self._stored(facts):
            return stored
        computed = await _in_thread(lambda stopped: digest_of(model, stopped))
        await self._database.write(_insert_digest(facts, computed))
        return computed

    async def _stored(self, facts: _Facts) -> str:
        rows = await self._database.read(
            "SELECT digest FROM model_files WHERE path = ? AND size = ? AND mtime_ns = ?", facts
        )
        return str(rows[0]["digest"]) if rows else ""

    async def _hashes(self, model: Model, digest: str) -> bytes:
        rows = await self._database.read(
            "SELECT hashes FROM model_pieces WHERE digest = ?", (digest,)
        )
        if rows:
            return bytes(rows[0]["hashes"])
        computed = await _in_thread(lambda stopped: partial_file.hashes(model, stopped))
        await self._database.write(_insert_hashes(digest, computed))
        return computed


def copied(path: Path, digest: str, hashes: bytes) -> tuple[SqlStatement, SqlStatement]:
    """Return statements that store what is known of a downloaded file, so that it is not read
    again."""
    return _insert_hashes(digest, hashes), named(path, digest)


def named(path: Path, digest: str) -> SqlStatement:
    """Return the statement that stores the digest of a file under another name."""
    return _insert_digest(_facts(path), digest)


def forgotten(path: Path) -> SqlStatement:
    """Return the statement that deletes what is stored of a file."""
    return ("DELETE FROM model_files WHERE path = ?", (str(path),))


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


def _insert_digest(facts: _Facts, digest: str) -> SqlStatement:
    return ("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?)", (*facts, digest))


def _insert_hashes(digest: str, hashes: bytes) -> SqlStatement:
    return ("INSERT OR REPLACE INTO model_pieces VALUES (?, ?)", (digest, hashes))
