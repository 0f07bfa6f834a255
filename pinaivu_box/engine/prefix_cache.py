"""Which sequences of the KV cache share which cells: a radix tree over sequence ids.

In llama.cpp's unified cache a cell belongs to a set of sequences, and `llama_memory_seq_cp` adds a
sequence to another's cells without moving anything.  This tree mirrors that: a node stands for
cells that the same sequences share, an edge's label is their tokens, and a sequence is a path from
the root to its leaf.  So the cells in use are counted exactly, and the longest known prefix of a
prompt is found by walking down.  Pure bookkeeping: the caller moves the cells.

A sequence is *live* while it runs.  Once it has finished it may stay as *cached*, to be copied
from, until it is evicted, the least recently used first.

Finding a prefix reveals that another request had the same text, so a node has a *scope*: only
sequences of that scope find it, and none finds what is PRIVATE.  The first tokens of a sequence
may be in another scope than those after them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PRIVATE = ""


class PrefixScope(NamedTuple):
    """Which sequences share cells: the first `public` ones are shared with those that have as many
    in the scope `common`, the others with those of `scope`; if that is PRIVATE none is public."""

    scope: str = PRIVATE
    public: int = 0
    common: str = PRIVATE

    def in_common(self, other: PrefixScope, tokens: list[int], its: list[int]) -> int:
        """How many of its first `tokens` a sequence may share with another, which has `its` tokens
        and the scope `other`."""
        if PRIVATE in (self.scope, other.scope) or self[1:] != other[1:]:
            return 0
        if self.scope != other.scope and not self.public:
            return 0
        common = common_prefix(its, tokens)
        return common if self.scope == other.scope else min(common, self.public)


class _Node:
    __slots__ = ("children", "ends", "parent", "scope", "tokens")

    def __init__(self, parent: _Node | None, tokens: list[int], scope: str) -> None:
        self.parent = parent
        self.tokens = tokens
        self.scope = scope
        self.children: list[_Node] = []
        self.ends: set[int] = set()  # sequence ids whose path ends here


class PrefixCache:
    """Sequence ids are the KV cache's.  Lengths and counts are in tokens (= cells)."""

    def __init__(self) -> None:
        self._root = _Node(None, [], PRIVATE)
        self._leaf: dict[int, _Node] = {}
        self._shares: dict[int, PrefixScope] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.cells = 0

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._leaf

    def match(self, tokens: list[int], share: PrefixScope) -> tuple[int, int]:
        """The length of the longest prefix of `tokens` that `share` may find, and a sequence that
        has it (or -1)."""
        if share.scope == PRIVATE:
            return 0, -1
        best_length, best = 0, self._root
        stack = [(self._root, 0)]
        while stack:
            node, before = stack.pop()
            # Two sequences may have computed the same tokens side by side, so more than one child
            # can begin alike, and the longest match can lie behind the shorter edge.
            left = share.public - before
            scope = share.common if left > 0 else share.scope
            for child in node.children:
                if child.scope != scope:
                    continue
                common = common_prefix(child.tokens, tokens, before)
                if left > 0:
                    common = min(common, left)
                if before + common > best_length:
                    best_length, best = before + common, child
                if common == len(child.tokens):
                    stack.append((child, before + common))
        return best_length, -1 if best is self._root else self._any_sequence(best)

    def open(self, sequence_id: int, share: PrefixScope, source: int = -1, length: int = 0) -> None:
        """Add a live sequence that shares the first `length` cells of `source`, as matched."""
        node = self._at(source, length) if length else self._root
        node.ends.add(sequence_id)
        self._leaf[sequence_id] = node
        self._shares[sequence_id] = share
        if source in self._cached:
            self._cached.move_to_end(source)

    def extend(self, sequence_id: int, tokens: Sequence[int]) -> None:
        """Note that `tokens` of the sequence were computed into new cells."""
        share, scope = self._shares[sequence_id], self._leaf[sequence_id].scope
        if share.public and scope != share.scope:
            left = max(0, share.public - self.length(sequence_id))
            self._append(sequence_id, tokens[:left], share.common)
            tokens = tokens[left:]
        self._append(sequence_id, tokens, share.scope)

    def _append(self, sequence_id: int, tokens: Sequence[int], scope: str) -> None:
        if not tokens:
            return
        node = self._leaf[sequence_id]
        alone = len(node.ends) == 1 and not node.children
        if node is self._root or node.scope != scope or not alone:
            node.ends.discard(sequence_id)
            child = _Node(node, [], scope)
            node.children.append(child)
            child.ends.add(sequence_id)
            self._leaf[sequence_id] = node = child
        node.tokens.extend(tokens)
        self.cells += len(tokens)

    def keep(self, sequence_id: int) -> list[int]:
        """Cache a sequence that has finished.  Returns the cached sequences that are now redundant:
        others share their whole path, and keep its cells."""
        self._cached[sequence_id] = None
        return [other for other in self._cached if self._redundant(self._leaf[other], other)]

    def reopen(self, sequence_id: int, share: PrefixScope, length: int) -> None:
        """Turn a cached sequence into another, live one with the first `length` of its cells, as
        matched."""
        del self._cached[sequence_id]
        self._shares[sequence_id] = share
        node = self._at(sequence_id, length)
        old = self._leaf[sequence_id]
        if node is not old:
            node.ends.add(sequence_id)
            self._leaf[sequence_id] = node
            self._prune(old, sequence_id)

    def release(self, sequence_id: int) -> None:
        """Note that the sequence was removed; cells that no other shares are free."""
        self._cached.pop(sequence_id, None)
        del self._shares[sequence_id]
        self._prune(self._leaf.pop(sequence_id), sequence_id)

    def _prune(self, leaf: _Node, sequence_id: int) -> None:
        node: _Node | None = leaf
        leaf.ends.discard(sequence_id)
        while node is not None and node.parent and not node.children and not node.ends:
            self.cells -= len(node.tokens)
            node.parent.children.remove(node)
            node = node.parent
        self._merge(node)

    def is_cached(self, sequence_id: int) -> bool:
        return sequence_id in self._cached

    def oldest(self, *, excluding: int = -1) -> int | None:
        """The cached sequence to evict next, None if there is none (other than `excluding`)."""
        return next((cached for cached in self._cached if cached != excluding), None)

    def newest(self) -> list[int]:
        """The cached sequences, the most recently used first."""
        return list(reversed(self._cached))

    def share_of(self, sequence_id: int) -> PrefixScope:
        return self._shares[sequence_id]

    def tokens_of(self, sequence_id: int) -> list[int]:
        """The tokens of all its cells."""
        nodes = reversed(list(self._path(sequence_id)))
        return [token for node in nodes for token in node.tokens]

    def length(self, sequence_id: int) -> int:
        """How many cells the sequence has, shared ones included."""
        return sum(len(node.tokens) for node in self._path(sequence_id))

    def live_cells(self, *, excluding: int = -1) -> int:
        """Cells of live sequences (other than `excluding`); the others can be had by evicting."""
        if not self._cached and excluding < 0:
            return self.cells
        seen: set[_Node] = set()
        cells = 0
        for sequence_id in self._leaf:
            if sequence_id in self._cached or sequence_id == excluding:
                continue
            for node in self._path(sequence_id):
                if node in seen:
                    break
                seen.add(node)
                cells += len(node.tokens)
        return cells

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant is broken.  Walks the tree: for idle times."""
        cells, ends = 0, {}
        for node in self._nodes():
            cells += len(node.tokens)
            for sequence_id in node.ends:
                if sequence_id in ends:
                    raise AssertionError(f"sequence {sequence_id} ends in two nodes")
                ends[sequence_id] = node
            if node.parent is not None:
                if not node.children and not node.ends:
                    raise AssertionError("a node belongs to no sequence")
                if any(child.parent is not node for child in node.children):
                    raise AssertionError("a child has another parent")
        if cells != self.cells:
            raise AssertionError(f"{self.cells} cells are counted, {cells} are in the tree")
        if ends != self._leaf or not set(self._cached) <= set(ends):
            raise AssertionError("the sequences and the tree disagree")
        if set(self._shares) != set(ends):
            raise AssertionError("the sequences and their scopes disagree")
        for sequence_id, share in self._shares.items():
            if share.scope == PRIVATE and sequence_id in self._cached:
                raise AssertionError("cells are kept that no sequence may find")
            self._check_scopes(sequence_id, share)

    def _check_scopes(self, sequence_id: int, share: PrefixScope) -> None:
        end = self.length(sequence_id)
        for node in self._path(sequence_id):
            start = end - len(node.tokens)
            scope = share.common if start < share.public else share.scope
            if node.scope != scope or start < share.public < end:
                raise AssertionError(f"cells of sequence {sequence_id} are in another scope")
            end = start

    # -- the tree ------------------------------------------------------------------------------

    def _path(self, sequence_id: int) -> Iterator[_Node]:
        """The nodes with the sequence's cells, from its leaf up."""
        node = self._leaf[sequence_id]
        while node.parent is not None:
            yield node
            node = node.parent

    def _at(self, sequence_id: int, length: int) -> _Node:
        """The node at which the first `length` cells of the sequence end, made by a split."""
        for node in reversed(list(self._path(sequence_id))):
            if length <= len(node.tokens):
                return node if length == len(node.tokens) else self._split(node, length)
            length -= len(node.tokens)
        raise ValueError(f"sequence {sequence_id} is shorter than that by {length}")

    def _split(self, node: _Node, length: int) -> _Node:
        upper = _Node(node.parent, node.tokens[:length], node.scope)
        upper.children.append(node)
        if node.parent is not None:
            node.parent.children[node.parent.children.index(node)] = upper
        node.parent, node.tokens = upper, node.tokens[length:]
        return upper

    def _merge(self, node: _Node | None) -> None:
        """A node with one child of its scope and no end of its own is one edge with it."""
        if node is None or node.parent is None or node.ends or len(node.children) != 1:
            return
        child = node.children[0]
        if child.scope != node.scope:
            return
        child.tokens = node.tokens + child.tokens
        child.parent = node.parent
        node.parent.children[node.parent.children.index(node)] = child

    def _redundant(self, node: _Node, sequence_id: int) -> bool:
        return bool(node.children) or any(
            other != sequence_id and (other not in self._cached or other > sequence_id)
            for other in node.ends
        )

    def _any_sequence(self, node: _Node) -> int:
        while not node.ends:
            node = node.children[0]
        return next(iter(node.ends))

    def _nodes(self) -> Iterator[_Node]:
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack += node.children
            yield node


def common_prefix(label: list[int], tokens: list[int], start: int = 0) -> int:
    """How many tokens of `label` are at `start` in `tokens`."""
    low, high = 0, min(len(label), len(tokens) - start)
    if label[:high] == tokens[start : start + high]:
        return high
    while high - low > 1:  # slices compare in C: halving beats a loop over tokens
        middle = (low + high) // 2
        if label[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low
