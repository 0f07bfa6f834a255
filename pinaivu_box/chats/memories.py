"""What the box remembers of a user: sentences, sealed with the account's data key."""

from __future__ import annotations

import asyncio
import re

import msgspec

from pinaivu_box.chats.conversations import new_id, readable
from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.chats.settings import change_settings, settings_of
from pinaivu_box.errors import RowConflict, RowNotFound
from pinaivu_box.openai.memories import MAX_MEMORY, Memory, Origin
from pinaivu_box.store import memories as rows
from pinaivu_box.store.database import Database
from pinaivu_box.store.memories import MemoryRow
from pinaivu_box.store.times import now_ms

MAX_MEMORIES = 1_000  # of an account
_SAME = 0.8  # of the words of two memories: they say the same
# Spaces and punctuation: ASCII's, Latin-1's, general and that of Chinese and Japanese.
_BETWEEN_WORDS = re.compile(
    r"[\s!-/:-@\[-`{-~\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]+"
)


class SealedMemory(msgspec.Struct, array_like=True):
    text: str
    origin: Origin


class SealedVector(msgspec.Struct, array_like=True):
    """Little-endian 32-bit floats, of that model, of the memory's text at that time."""

    model: str
    updated_at: int
    vector: bytes


class Memories:
    """Those of one account."""

    def __init__(self, database: Database, sealer: RowSealer) -> None:
        self._database, self._sealer = database, sealer
        self._account = sealer.account_id

    async def ls(self) -> list[Memory]:
        """All that can be opened, newest first."""
        return readable(await rows.ls(self._database, self._account), self._opened)

    async def with_vectors(self, model: str) -> list[tuple[Memory, bytes]]:
        """All, each with its vector by that model; empty where there is none."""
        found = []
        for row in await rows.ls(self._database, self._account):
            if not (opened := readable([row], self._opened)):
                continue
            vector = b""
            if row.vector:
                stored = self._sealer.open(row.vector, SealedVector, "vector", row.id)
                if stored.model == model and stored.updated_at == row.updated_at:
                    vector = stored.vector
            found.append((opened[0], vector))
        return found

    async def put_vector(self, memory: Memory, model: str, vector: bytes) -> None:
        """Store the vector of a memory as it is."""
        content = SealedVector(model, memory.updated_at, vector)
        sealed = self._sealer.seal(content, "vector", memory.id)
        await self._database.write(
            rows.put_vector(memory.id, self._account, memory.updated_at, sealed)
        )

    async def add(self, text: str, origin: Origin) -> tuple[Memory, bool]:
        """A new memory, or the one that says the same already; whether it is new.

        Raises RowConflict if there are as many as there may be.
        """
        ((memory, new),) = await self.add_all([(text, now_ms())], origin)
        if memory is None:
            raise RowConflict(
                f"There are {MAX_MEMORIES} memories, which is all that an account may have: delete "
                "some."
            )
        return memory, new

    async def add_all(
        self, texts: list[tuple[str, int]], origin: Origin
    ) -> list[tuple[Memory | None, bool]]:
        """As `add`, with the time of each; None for those that there is no room for."""
        known = await rows.ls(self._database, self._account)
        # Of many memories that takes long, and others have their turn meanwhile.
        found = await asyncio.to_thread(self._with_new, known, texts, origin)
        inserts = [rows.insert(row, self._account, MAX_MEMORIES) for _, row in found if row]
        added = iter(await self._database.write(*inserts) if inserts else ())
        stored = {memory.id for memory, row in found if row and next(added)}
        new = {memory.id for memory, row in found if row}
        return [
            (memory, row is not None)
            if memory.id in stored or memory.id not in new
            else (None, False)
            for memory, row in found
        ]

    def _with_new(
        self, known: list[MemoryRow], texts: list[tuple[str, int]], origin: Origin
    ) -> list[tuple[Memory, MemoryRow | None]]:
        """For each text the memory that says it, and its row if it is to be stored."""
        memories = [(one, frozenset(words_of(one.text))) for one in readable(known, self._opened)]
        found: list[tuple[Memory, MemoryRow | None]] = []
        for text, at in texts:
            text = tidy(text)
            words = frozenset(words_of(text))
            same = (one for one, own in memories if _same(one.text, own, text, words))
            if (memory := next(same, None)) is not None:
                found.append((memory, None))
                continue
            content = SealedMemory(text, origin)
            row = self._row(new_id("mem"), at, at, content)
            memory = Memory(row.id, text, origin, at, at)
            memories.append((memory, words))
            found.append((memory, row))
        return found

    async def change(self, memory_id: str, text: str) -> Memory:
        """Raises RowNotFound."""
        memory = await self.get(memory_id)
        content = SealedMemory(tidy(text), memory.origin)
        row = self._row(memory.id, memory.created_at, now_ms(), content)
        await self._database.write(rows.update(row, self._account))
        return self._opened(row)

    async def get(self, memory_id: str) -> Memory:
        """Raises RowNotFound."""
        for memory in await self.ls():
            if memory.id == memory_id:
                return memory
        raise RowNotFound("There is no such memory: it may have been deleted.")

    async def delete(self, memory_id: str) -> None:
        """For good.  Raises RowNotFound."""
        (deleted,) = await self._database.write(rows.delete(memory_id, self._account))
        if not deleted:
            raise RowNotFound("There is no such memory: it may have been deleted.")

    async def delete_some(self, memory_ids: list[str]) -> None:
        """For good; those that are gone already are passed over."""
        if memory_ids:
            await self._database.write(*(rows.delete(one, self._account) for one in memory_ids))

    async def delete_all(self) -> None:
        await self._database.write(rows.delete_all(self._account))

    async def enabled(self) -> bool:
        """Whether conversations use and add memories."""
        return (await settings_of(self._database, self._sealer)).memories

    async def enable(self, *, enabled: bool) -> None:
        await change_settings(self._database, self._sealer, memories=enabled)

    def _row(
        self, memory_id: str, created_at: int, updated_at: int, content: SealedMemory
    ) -> MemoryRow:
        sealed = self._sealer.seal(content, "memory", memory_id)
        return MemoryRow(memory_id, created_at, updated_at, sealed)

    def _opened(self, row: MemoryRow) -> Memory:
        content = self._sealer.open(row.sealed, SealedMemory, "memory", row.id)
        return Memory(row.id, content.text, content.origin, row.created_at, row.updated_at)


def tidy(text: str) -> str:
    """On one line, without what nobody sees, cut to what a memory may have."""
    line = "".join(one if one.isprintable() else " " for one in text)
    return " ".join(line.split())[:MAX_MEMORY]


def words_of(text: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(text.casefold()) if word]


def _same(one: str, first: frozenset[str], other: str, second: frozenset[str]) -> bool:
    if not first or not second:
        return one == other
    # In a short sentence a single other word is another fact: "my dog is Rex", "my cat is Rex".
    if min(len(first), len(second)) < 8:
        return first == second
    return len(first & second) / len(first | second) >= _SAME
