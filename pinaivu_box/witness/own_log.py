"""What the witnesses of this box need of its own log."""

from __future__ import annotations

from typing import Protocol

from pinaivu_box.log.note import Note


class OwnLog(Protocol):
    """A StoreError says that the log does not have so many entries."""

    @property
    def origin(self) -> str: ...

    async def checkpoint(self) -> Note:
        """The newest, signed, with the cosignatures that it has."""

    async def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """The hashes which prove that the first `new` entries begin with the first `old`."""

    async def growth(self, origin: str, old: int, new: int) -> tuple[bytes, tuple[bytes, ...]]:
        """The root of the first `old` entries, and the proof; of this log, or of an earlier one."""

    def statement(self) -> bytes:
        """With which the log began, if it followed another: JSON of a `log.restart.SignedRestart`;
        else empty."""

    async def add_cosignatures(self, signed: Note) -> object:
        """Keep the cosignatures of a checkpoint, which were verified.  Raises NoteError if it is
        not one of the log's."""

    async def seen_elsewhere(self, signed: Note) -> object:
        """Take notice of a checkpoint of this box's that others have.  Raises NoteError."""
