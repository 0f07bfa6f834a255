"""Tiles (C2SP tlog-tiles): 256 hashes of a tree at a level that is a multiple of 8, side by side.

A tree is stored and published as these; every hash in between follows from one tile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct

from pinaivu_box.log import merkle
from pinaivu_box.log.merkle import HASH_BYTES, Subtree
from pinaivu_box.text import END

HEIGHT = 8
WIDTH = 1 << HEIGHT  # hashes in a full tile
_PATH = re.compile(
    r"(0|[1-9]|[1-5][0-9]|6[0-3]|entries)/((?:x[0-9]{3}/){0,5}[0-9]{3})"
    r"(?:\.p/([1-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5]))?" + END
)


class Tile(Struct, frozen=True):
    """`width` is the number of its hashes: 256, or fewer at the right edge of a tree.  Of level 0
    are those with hashes of leaves; each further level is 8 levels of the tree above."""

    level: int
    index: int
    width: int = WIDTH

    @property
    def first(self) -> int:
        """The index of its first hash among those of its level."""
        return self.index * WIDTH


class TilePath(NamedTuple):
    """`entries`: a bundle of the entries themselves instead of their hashes (level 0)."""

    tile: Tile
    entries: bool


def read_path(path: str) -> TilePath | None:
    """What follows `/tile/` in an address; None if that is no tile."""
    if not (match := _PATH.match(path)):
        return None
    level, number, width = match.groups()
    groups = number.replace("x", "").split("/")
    if len(groups) > 1 and groups[0] == "000":
        return None  # another spelling
    tile = Tile(0 if level == "entries" else int(level), int("".join(groups)), int(width or WIDTH))
    return TilePath(tile, level == "entries")


def path_of(tile: Tile) -> str:
    digits = str(tile.index)
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    number = "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:])
    return f"{tile.level}/{number}" + (f".p/{tile.width}" if tile.width < WIDTH else "")


def width_of(level: int, index: int, size: int) -> int:
    """How many hashes that tile has in a tree of `size` leaves; 0 if the tree has it not."""
    return max(0, min(WIDTH, (size >> (HEIGHT * level)) - index * WIDTH))


def tile_of(subtree: Subtree) -> tuple[int, int]:
    """Level and index of the tile that the hash of a complete subtree follows from."""
    level = subtree.level // HEIGHT
    return level, subtree.index << (subtree.level - level * HEIGHT) >> HEIGHT


def subtree_hash(subtree: Subtree, tiles: Mapping[tuple[int, int], bytes]) -> bytes:
    """From the bytes of its tile, of which as many hashes are there as it needs."""
    level, index = tile_of(subtree)
    count = 1 << (subtree.level - level * HEIGHT)
    first = (subtree.index * count - index * WIDTH) * HASH_BYTES
    data = tiles[level, index][first : first + count * HASH_BYTES]
    return merkle.root([data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)])
