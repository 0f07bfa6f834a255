"""Proofs from the stored log, to checkpoints that there are.  Nothing is signed here, so a command
needs neither the key nor the server."""

from __future__ import annotations

from collections.abc import Sequence

from pinaivu_box.errors import InvalidValue
from pinaivu_box.log import checkpoint, merkle, note, tiles
from pinaivu_box.log.entry_proof import EntryProof, entry_of
from pinaivu_box.log.tiles import TilePath
from pinaivu_box.receipt_log import tree
from pinaivu_box.store import log as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.log import Log, LogDamaged


async def of_receipt(database: Database, logs: Sequence[Log], request_id: str) -> EntryProof | None:
    """That the receipt of a request is in the log: to the newest checkpoint with cosignatures that
    covers it, else to the newest.  None if there is no such receipt, or no checkpoint covers it.

    Raises LogDamaged.
    """
    receipt = await store.receipt(database, request_id)
    if receipt is None or receipt.entry is None:
        return None
    if (log := history_of(logs, receipt.entry)) is None:
        return None
    index = receipt.entry - log.first_entry
    if (stored := await store.checkpoint_over(database, log, index)) is None:
        return None
    ranges = merkle.inclusion_ranges(index, stored.size)
    proof = EntryProof(index, await _hashes(database, log, ranges), note.read(stored.note))
    if not proof.includes(entry_of(receipt.signed), checkpoint.read(proof.note)):
        raise LogDamaged(f"the receipt of {request_id} is not the one that was logged")
    return proof


async def inclusion(database: Database, request_id: str) -> str | None:
    """`of_receipt` as receipts have it; None too if the log is damaged, which others say."""
    try:
        found = await of_receipt(database, await store.logs(database), request_id)
    except LogDamaged:
        return None
    return found.in_receipts if found is not None else None


def history_of(logs: Sequence[Log], entry: int) -> Log | None:
    """The one that has the entry with this id."""
    return next((log for log in reversed(logs) if log.has(entry)), None)


async def of_growth(database: Database, log: Log, old: int, new: int) -> tuple[bytes, ...]:
    """The hashes which prove that the first `new` entries begin with the first `old`, both of which
    checkpoints cover.  Raises InvalidValue, LogDamaged."""
    stored = await store.last_checkpoint(database, log)
    size = stored.size if stored is not None else 0
    if not 0 <= new <= size:
        raise InvalidValue(f"the newest checkpoint is of {size} entries", field="to")
    if not 0 <= old <= new:
        raise InvalidValue(f"must be from 0 to {new}, where the proof ends", field="from")
    if old in (0, new):
        return ()
    return await _hashes(database, log, merkle.consistency_ranges(old, new))


async def tile(database: Database, log: Log, path: TilePath) -> bytes | None:
    """A tile, or a bundle of entries, of the tree that the newest checkpoint is about; None if it
    has none there.  Raises LogDamaged."""
    wanted, stored = path.tile, await store.last_checkpoint(database, log)
    size = stored.size if stored is not None else 0
    if wanted.width > tiles.width_of(wanted.level, wanted.index, size):
        return None
    if not path.entries:
        return await tree.tile(database, log, wanted.level, wanted.index, wanted.width)
    bounds = (wanted.first, wanted.first + wanted.width)
    (entries,) = await store.entries(database, log, [bounds])
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


async def _hashes(database: Database, log: Log, ranges: list[tuple[int, int]]) -> tuple[bytes, ...]:
    known = await tree.hashes(database, log, ranges)
    return tuple(merkle.range_hash(*each, known.__getitem__) for each in ranges)
