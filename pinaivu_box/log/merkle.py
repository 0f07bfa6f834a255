"""Merkle trees as in RFC 6962, section 2.1 (RFC 9162, section 2.1): hashes, proofs, verification.

Pure.  A hash is 32 bytes of SHA-256.  What a proof consists of is said as ranges of leaves, each of
which decomposes into complete subtrees; whoever stores the tree has the hashes of those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

from msgspec import Struct

HASH_BYTES = 32
MAX_SIZE = 2**53  # leaves; sizes are exact numbers in JSON then
MAX_PROOF_HASHES = 63  # of a consistency proof, as C2SP tlog-witness has it
EMPTY_ROOT = hashlib.sha256(b"").digest()


class Subtree(Struct, frozen=True):
    """A complete one: the leaves from `index * 2**level` on, `2**level` of them."""

    level: int
    index: int


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over hashes of leaves (or over those of complete subtrees of one size)."""
    if not leaves:
        return EMPTY_ROOT
    level = list(leaves)
    while len(level) > 1:
        pairs = [node_hash(*level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def complete_subtrees(start: int, end: int) -> list[Subtree]:
    """The largest complete subtrees that make up the leaves from `start` to before `end`, in order.
    `start` is a multiple of the first one's number of leaves."""
    subtrees = []
    while start < end:
        level = (end - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        subtrees.append(Subtree(level, start >> level))
        start += 1 << level
    return subtrees


def range_hash(start: int, end: int, hash_of: Callable[[Subtree], bytes]) -> bytes:
    """The hash over a range of leaves, as the tree has it, from those of its complete subtrees."""
    hashes = [hash_of(subtree) for subtree in complete_subtrees(start, end)]
    return reduce(lambda right, left: node_hash(left, right), reversed(hashes))


def inclusion_ranges(index: int, size: int) -> list[tuple[int, int]]:
    """The ranges whose hashes prove that a tree of that size has the leaf, the leaf's sibling
    first (RFC 6962, section 2.1.1)."""
    start, end = 0, size
    ranges = []
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    return ranges[::-1]


def consistency_ranges(old: int, new: int) -> list[tuple[int, int]]:
    """The ranges whose hashes prove that the first `old` leaves of a tree of size `new` are those
    of the tree of size `old`, where 0 < old <= new (RFC 6962, section 2.1.2)."""
    start, end = 0, new
    ranges = []
    while end != old:
        middle = start + _split(end - start)
        if old <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    if start:
        ranges.append((start, end))
    return ranges[::-1]


def includes(root_hash: bytes, size: int, index: int, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof leads from the hash of a leaf to the root (RFC 9162, section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    position, last, current = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if position % 2 or position == last:
            current = node_hash(sibling, current)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            current = node_hash(current, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and current == root_hash


def is_consistent(
    old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Whether the proof shows that the tree of size `new` begins with that of size `old`
    (RFC 9162, section 2.1.4.2).  An empty tree begins every tree, without a proof."""
    if not 0 <= old <= new:
        return False
    if old == 0:
        return not proof and old_root == EMPTY_ROOT
    if old == new:
        return not proof and old_root == new_root
    return _roots(old, old_root, new, proof) == (old_root, new_root)


def other_beginning(
    old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Whether the proof shows that the tree of size `new` does not begin with that of size `old`
    and that root, where 0 < old < new: it leads from another root to `new_root`.

    If `old` is a power of two, the first hash is that other root itself, which consistency proofs
    leave out.
    """
    if not 0 < old < new:
        return False
    if old & (old - 1) == 0:
        other, hashes = (proof[0], proof[1:]) if proof else (old_root, proof)
        return other != old_root and _roots(old, other, new, hashes) == (other, new_root)
    roots = _roots(old, old_root, new, proof)
    return roots is not None and roots[0] != old_root and roots[1] == new_root


def _roots(
    old: int, old_root: bytes, new: int, proof: Sequence[bytes]
) -> tuple[bytes, bytes] | None:
    """The roots at both sizes that a consistency proof leads to, where 0 < old < new; None if its
    length is wrong."""
    hashes = list(proof)
    if old & (old - 1) == 0:
        hashes.insert(0, old_root)
    if not hashes:
        return None
    position, last = old - 1, new - 1
    while position % 2:
        position, last = position >> 1, last >> 1
    first = second = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            return None
        if position % 2 or position == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            second = node_hash(second, sibling)
        position, last = position >> 1, last >> 1
    return (first, second) if last == 0 else None


def needed_subtrees(ranges: Iterable[tuple[int, int]]) -> set[Subtree]:
    """All complete subtrees whose hashes these ranges are computed from."""
    return {subtree for start, end in ranges for subtree in complete_subtrees(start, end)}


def _split(size: int) -> int:
    """The largest power of two that is smaller."""
    return 1 << ((size - 1).bit_length() - 1)
