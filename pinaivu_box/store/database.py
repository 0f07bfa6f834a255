"""The box's SQLite file: a writer with group commit, two readers, WAL, `synchronous=FULL`.

A write returns once its transaction is on disk.  Writes that arrive during a commit share the next
one, so the ends of 64 requests at once cost a few fsyncs instead of 64.

`why_not_writable` says whether another write would succeed: what cannot be written need not be
computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from pinaivu_box.errors import DatabaseUnusable
from pinaivu_box.store.schema import CURRENT, BackUp, Schema, prepare, refuse_foreign

SqlStatement = tuple[str, Sequence[Any]]
Row = sqlite3.Row
_Pending = tuple[Sequence[SqlStatement], "asyncio.Future[list[int]]"]

log = logging.getLogger("pinaivu.database")

_BUSY_SECONDS = 15.0
_MAX_WRITES_PER_COMMIT = 256
_SLOW_SECONDS = 5.0  # of a statement that waits for the lock of another program, or for the disk
_LOOKS, _LOOK_SECONDS = 5, 0.01
_PROBE_SECONDS = 1.0  # between two attempts after a failure
_PROBE_BYTES = 65536  # about what the end of a request writes
_MAX_REWRITTEN_BYTES = 250_000_000  # writers wait meanwhile
_SCRUB_ATTEMPTS, _SCRUB_PAUSE_SECONDS = 50, 0.1
_SCRUB_INTERVAL_SECONDS = 600.0  # between two that nobody waits for
_PROBE: SqlStatement = ("REPLACE INTO probe VALUES (1, randomblob(?))", (_PROBE_BYTES,))
# The errors of SQLite that the next write would have too, whatever it writes.
_PERSISTENT_ERRORS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk fails, or has no room",
    sqlite3.SQLITE_READONLY: "the database is read-only",
    sqlite3.SQLITE_CANTOPEN: "a file of the database cannot be opened",
    sqlite3.SQLITE_BUSY: "another program has locked the database",
    sqlite3.SQLITE_PERM: "access to the database is denied",
    sqlite3.SQLITE_CORRUPT: "the database is damaged",
    sqlite3.SQLITE_NOTADB: "the database is damaged",
}


class Database:
    """Use as an async context manager, or `open` and `close`.

    `back_up` is called before the file is migrated from one version of the schema to another.
    """

    def __init__(self, path: Path, schema: Schema = CURRENT, back_up: BackUp | None = None) -> None:
        self.path = path
        self._schema, self._back_up = schema, back_up
        self._writer: aiosqlite.Connection
        self._reader: aiosqlite.Connection
        self._scanner: aiosqlite.Connection
        self._queue: asyncio.Queue[_Pending | None] = asyncio.Queue()
        self._committer: asyncio.Task[None]
        self._failure: str | None = None  # why the last write failed, if all would
        self._succeeded_at = self._failed_at = -math.inf
        self._waiting_since: float | None = None  # for the statement that runs
        self._probing: asyncio.Task[None] | None = None
        self._scrubbing = asyncio.Lock()
        self._scrubs_begun, self._scrubbed_at = 0, -math.inf
        self._scrub_wanted = False  # by `scrub_later`
        self._scrubber: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.committed: Callable[[float], None] = lambda _seconds: None  # told how long each took

    @property
    def failing(self) -> bool:
        """Whether the last write failed in a way that the next would too."""
        return self._failure is not None

    async def open(self) -> None:
        """Create the file if it does not exist.  Raises DatabaseUnusable, and CliError if it must
        be migrated and cannot be backed up before."""
        # Created here for its mode, which SQLite's other files take from it.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        async with contextlib.AsyncExitStack() as connections:
            self._writer = await connections.enter_async_context(_connected(self.path))
            await prepare(self._writer, self.path, self._schema, self._back_up)
            await self._writer.execute("PRAGMA foreign_keys = ON")
            # What is deleted is overwritten: chats that are gone are gone.
            await self._writer.execute("PRAGMA secure_delete = ON")
            self._reader = await connections.enter_async_context(_connected(self.path))
            self._scanner = await connections.enter_async_context(_connected(self.path))
            self._connections = connections.pop_all()
        self._committer = asyncio.create_task(self._commit_forever())

    async def close(self) -> None:
        """Write what is waiting, scrub if that is still to be done, then close."""
        await self._queue.put(None)
        await self._committer
        self._closing.set()
        if self._scrubber is not None:
            await self._scrubber
        await self._connections.aclose()

    async def __aenter__(self) -> Database:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Run a query that an index answers, such as requests wait for."""
        return list(await self._reader.execute_fetchall(sql, parameters))

    async def scan(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """As `read`, for queries over many rows, which other readers do not wait for."""
        return list(await self._scanner.execute_fetchall(sql, parameters))

    async def write(self, *statements: SqlStatement) -> list[int]:
        """Run the statements in one transaction; it is on disk on return.

        Returns their row counts.  Cancelling the caller does not cancel the write.
        """
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        await self._queue.put((statements, future))
        return await asyncio.shield(future)

    async def scrub(self) -> None:
        """Leave nothing of what was deleted in the files: the WAL is emptied, and a file that is
        not large is written anew, since pages keep copies of rows that were moved.

        Another program that reads may prevent it for so long that it is given up.  Those who ask
        while one runs share the next one.
        """
        begun = self._scrubs_begun
        async with self._scrubbing:
            if self._scrubs_begun > begun:
                return
            self._scrubs_begun += 1
            try:
                await self._scrub()
            finally:
                self._scrubbed_at = time.monotonic()

    def scrub_later(self) -> None:
        """`scrub` without waiting for it: writers wait meanwhile, so it is done once in a while,
        however often it is asked for."""
        self._scrub_wanted = True
        if self._scrubber is None or self._scrubber.done():
            self._scrubber = asyncio.create_task(self._scrub_once_due())

    async def _scrub_once_due(self) -> None:
        while self._scrub_wanted:
            pause = self._scrubbed_at + _SCRUB_INTERVAL_SECONDS - time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), max(pause, 0.0))
            self._scrub_wanted = False
            try:
                await self.scrub()
            except Exception:
                log.exception("what was deleted may still be in %s", self.path)

    async def _scrub(self) -> None:
        async with _connected(self.path) as connection:
            if await _size(connection) <= _MAX_REWRITTEN_BYTES:
                try:
                    await connection.execute("VACUUM")
                except sqlite3.OperationalError as error:  # no room, or locked for too long
                    log.warning("%s was not written anew: %s", self.path, error)
            for _ in range(_SCRUB_ATTEMPTS):
                (row,) = await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
                if not row[0]:
                    return
                await asyncio.sleep(_SCRUB_PAUSE_SECONDS)
        log.warning("the WAL of %s was not emptied: others read it", self.path)

    async def why_not_writable(self, within: float) -> str | None:
        """Why nothing can be written now, as the end of a sentence, or None.

        If nothing was written in the last `within` seconds, a write is made to find out, at most
        one a second.  It does not wait longer than a slow disk may take.
        """
        if await self._stays_slow():
            return f"a write has been waiting for {self._waited():.0f} s"
        now = time.monotonic()
        if self._failure is None and now - self._succeeded_at < within:
            return None
        if self._failure is not None and now - self._failed_at < _PROBE_SECONDS:
            return self._failure
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        await asyncio.wait({self._probing}, timeout=_SLOW_SECONDS)
        await asyncio.wait({self._probing}, timeout=_LOOKS * _LOOK_SECONDS)  # as in `_stays_slow`
        if not self._probing.done():
            return f"a write has been waiting for {_SLOW_SECONDS:.0f} s"
        return self._failure

    async def _stays_slow(self) -> bool:
        """Whether the statement that runs takes too long.  It may be done, and only this loop have
        been busy until now: so look again."""
        for _ in range(_LOOKS):
            if self._waited() <= _SLOW_SECONDS:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return self._waited() > _SLOW_SECONDS

    def _waited(self) -> float:
        """For how many seconds the statement that runs has been waiting; 0 if none runs."""
        return 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since

    async def _probe(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            await self.write(_PROBE)

    def _note_result(self, error: Exception | None) -> None:
        if error is None:
            self._failure, self._succeeded_at = None, time.monotonic()
        elif why := _PERSISTENT_ERRORS.get(_code(error)):
            if self._failure is None:
                log.error("nothing can be written to %s: %s", self.path, error)
            self._failure, self._failed_at = f"{why} ({error})", time.monotonic()

    async def _commit_forever(self) -> None:
        closing = False
        while not closing:
            batch = [await self._queue.get()]
            while len(batch) < _MAX_WRITES_PER_COMMIT and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            closing = None in batch
            if writes := [pending for pending in batch if pending is not None]:
                await self._commit(writes)

    async def _commit(self, writes: list[_Pending]) -> None:
        began = time.monotonic()
        try:
            counts = await self._run(writes)
        except Exception as error:  # all of them are for the callers
            self._note_result(error)
            if len(writes) > 1 and _code(error) != sqlite3.SQLITE_BUSY:
                # One of them failed (or the disk did): alone, each gets its own result.
                for pending in writes:
                    await self._commit([pending])
            else:  # of a locked database, each alone would wait as long again
                for _, future in writes:
                    future.set_exception(error)
        else:
            self._note_result(None)
            self.committed(time.monotonic() - began)
            for (_, future), count in zip(writes, counts, strict=True):
                future.set_result(count)
        finally:
            self._waiting_since = None

    async def _run(self, writes: list[_Pending]) -> list[list[int]]:
        """The row counts of each write's statements, in one transaction."""
        counts: list[list[int]] = []
        await self._execute("BEGIN IMMEDIATE")
        try:
            for statements, _ in writes:
                counts.append(
                    [(await self._execute(*statement)).rowcount for statement in statements]
                )
            await self._execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                await self._writer.execute("ROLLBACK")
            raise
        return counts

    async def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> aiosqlite.Cursor:
        # Of each statement: those of many requests may take long together on a busy machine.
        self._waiting_since = time.monotonic()
        return await self._writer.execute(sql, parameters)


def _code(error: Exception) -> int:
    """SQLite's primary code of an error; 0 if it is another's."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


@contextlib.asynccontextmanager
async def _connected(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(path, timeout=_BUSY_SECONDS, isolation_level=None) as connection:
        connection.row_factory = sqlite3.Row
        try:
            await refuse_foreign(connection, path)  # before anything is changed in the file
            await _use_wal(connection)
            await connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            raise DatabaseUnusable(f"The database {path} cannot be opened: {error}.") from error
        yield connection


async def _size(connection: aiosqlite.Connection) -> int:
    """Bytes of the file."""
    ((pages,),) = await connection.execute_fetchall("PRAGMA page_count")
    ((size,),) = await connection.execute_fetchall("PRAGMA page_size")
    return int(pages * size)


async def _use_wal(connection: aiosqlite.Connection) -> None:
    # The first switch of a new file needs a lock that another process may hold.  SQLite does not
    # wait for that one by itself.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            await connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)
        else:
            return
