"""Keys for sealed data, of the sessions that have unwrapped theirs: in memory, never on disk."""

from __future__ import annotations

import asyncio
import logging

from pinaivu_box.store import sessions
from pinaivu_box.store.database import Database

log = logging.getLogger("pinaivu.login")

_INTERVAL_SECONDS = 3600.0


class SessionKeys:
    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}

    def put(self, session_id: str, key: bytes) -> None:
        self._keys[session_id] = key

    async def put_of(self, database: Database, session_id: str, key: bytes) -> None:
        """Keep it, unless the session has ended meanwhile."""
        self.put(session_id, key)
        if not await sessions.exists(database, session_id):
            self.drop(session_id)

    def get(self, session_id: str) -> bytes | None:
        return self._keys.get(session_id)

    def drop(self, session_id: str) -> None:
        self._keys.pop(session_id, None)

    async def drop_ended(self, database: Database) -> None:
        """Drop those of sessions that have ended."""
        kept = set(self._keys)  # before the look: a session that begins meanwhile is not in it
        for ended in kept - await sessions.valid_of(database, kept):
            self.drop(ended)

    async def drop_ended_hourly(self, database: Database) -> None:
        """Until cancelled: also of those that a command has ended, or that nobody used for long."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            try:
                await self.drop_ended(database)
            except Exception:
                log.exception("the keys of ended sessions could not be dropped")
