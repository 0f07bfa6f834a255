"""Hashes of a stored log.  Every one follows from a tile; those of level 0 are made from entries,
the others are stored once a checkpoint needs them, so that no proof reads more than a few rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from pinaivu_box.log import merkle, tiles
from pinaivu_box.log.merkle import HASH_BYTES, Subtree
from pinaivu_box.log.tiles import WIDTH
from pinaivu_box.store import log as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.log import Log, LogDamaged

Hashes = Mapping[Subtree, bytes]


async def hashes(database: Database, log: Log, ranges: Iterable[tuple[int, int]]) -> Hashes:
    """Of all complete subtrees that these ranges of leaves consist of.  Raises LogDamaged."""
    subtrees = merkle.needed_subtrees(ranges)
    counts: dict[tuple[int, int], int] = {}  # of hashes that are needed of each tile
    for subtree in subtrees:
        level, number = place = tiles.tile_of(subtree)
        width = 1 << (subtree.level - level * tiles.HEIGHT)
        end = (subtree.index + 1) * width - number * WIDTH
        counts[place] = max(counts.get(place, 0), end)
    found = await _tiles(database, log, counts)
    return {subtree: tiles.subtree_hash(subtree, found) for subtree in subtrees}


async def tile(database: Database, log: Log, level: int, number: int, width: int) -> bytes:
    """The first `width` hashes of a tile.  Raises LogDamaged if they are not there."""
    return (await _tiles(database, log, {(level, number): width}))[level, number]


async def _tiles(
    database: Database, log: Log, widths: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], bytes]:
    """So many of the first hashes of each tile, by level and number."""
    leaves = [(number, width) for (level, number), width in widths.items() if level == 0]
    ranges = [(number * WIDTH, number * WIDTH + width) for number, width in leaves]
    found = {}
    for (number, _), entries in zip(
        leaves, await store.entries(database, log, ranges), strict=True
    ):
        found[0, number] = b"".join(map(merkle.leaf_hash, entries))
    stored = [place for place in widths if place[0]]
    found |= await store.stored_tiles(database, log, stored)
    for place in stored:
        if len(found.get(place, b"")) < widths[place] * HASH_BYTES:
            raise LogDamaged(f"hashes of level {place[0]} are missing")
    return {place: found[place][: width * HASH_BYTES] for place, width in widths.items()}


async def extend(database: Database, log: Log, size: int) -> None:
    """Store all tiles of a tree of that size which are not stored yet.  Raises LogDamaged."""
    level = 1
    while (wanted := size >> (tiles.HEIGHT * level)) > 0:
        number, count = await store.stored_hashes(database, log, level)
        while number * WIDTH + count < wanted:
            width = min(WIDTH, wanted - number * WIDTH)
            data = await _extended(database, log, level, number, width)
            await database.write(store.put_tile(log, level, number, data))
            number, count = number + 1, 0
        level += 1


async def _extended(database: Database, log: Log, level: int, number: int, width: int) -> bytes:
    stored = await store.stored_tiles(database, log, [(level, number)])
    data = stored.get((level, number), b"")
    for position in range(len(data) // HASH_BYTES, width):
        child = await tile(database, log, level - 1, number * WIDTH + position, WIDTH)
        data += await asyncio.to_thread(_root, child)
    return data


def _root(data: bytes) -> bytes:
    return merkle.root([data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)])


async def root(database: Database, log: Log, size: int) -> bytes:
    """Raises LogDamaged."""
    if not size:
        return merkle.EMPTY_ROOT
    known = await hashes(database, log, [(0, size)])
    return merkle.range_hash(0, size, known.__getitem__)
