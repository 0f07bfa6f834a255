"""Receipts that no log has, for retention."""

from __future__ import annotations

from collections.abc import Sequence

from pinaivu_box.store.database import SqlStatement


async def unlogged(_entries: Sequence[int]) -> Sequence[SqlStatement]:
    """Nothing to record."""
    return ()
