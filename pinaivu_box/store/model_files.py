"""Digests of model files, remembered: reading 40 GB at every start would take a minute."""

from __future__ import annotations

import asyncio

from pinaivu_box.models.catalog import Model, digest_of
from pinaivu_box.store.database import Database


async def digest(database: Database, model: Model) -> str:
    """SHA-256 of the model's GGUF in hex, from memory while size and time are unchanged."""
    if model.recorded_digest:
        return model.recorded_digest
    stat = model.path.stat()
    facts = (str(model.path), stat.st_size, stat.st_mtime_ns)
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
