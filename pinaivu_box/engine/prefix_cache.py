"""Which sequences of the KV cache share which cells: a radix tree over sequence ids.

In llama.cpp's unified cache a cell belongs to a set of sequences, and `llama_memory_seq_cp` adds a
sequence to another's cells without moving anything.  This tree mirrors that: a node stands for
cells that the same sequences share, an edge's label is their tokens, and a sequence is a path from
the root to its leaf.  So the cells in use are counted exactly, and the longest known prefix of a
prompt is found by walking down.  Pure bookkeeping: the caller moves the cells.

A sequence is *live* while it runs.  Once it has finished it may stay as *cached*, to be copied
from, until it is evicted, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence


class _Node:
    __slots__ = ("children", "ends", "parent", "tokens")

    def __init__(self, parent: _Node | None, tokens: list[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: list[_Node] = []
        self.ends: set[int] = set()  # sequence ids whose path ends here


class PrefixCache:
    """Sequence ids are the KV cache's.  Lengths and counts are in tokens (= cells)."""

    def __init__(self) -> None:
        self._root = _Node(None, [])
        self._leaf: dict[int, _Node] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.cells = 0

    @property
    def cached(self) -> int:
        """How many finished sequences are kept."""
        return len(self._cached)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._leaf

    def match(self, tokens: list[int]) -> tuple[int, int]:
        """Length of the longest known prefix of `tokens`, and a sequence that has it (or -1)."""
        best_length, best = 0, self._root
        stack = [(self._root, 0)]
        while stack:
            node, before = stack.pop()
            # Two sequences may have computed the same tokens side by side, so more than one child
            # can begin alike, and the longest match can lie behind the shorter edge.
            for child in node.children:
                common = common_prefix(child.tokens, tokens, before)
                if before + common > best_length:
                    best_length, best = before + common, child
                if common == len(child.tokens):
                    stack.append((child, before + common))
        return best_length, -1 if best is self._root else self._somebody(best)

    def open(self, sequence_id: int, source: int = -1, length: int = 0) -> None:
        """A new live sequence that shares the first `length` cells of `source`."""
        node = self._at(source, length) if length else self._root
        node.ends.add(sequence_id)
        self._leaf[sequence_id] = node
        if source in self._cached:
            self._cached.move_to_end(source)

    def extend(self, sequence_id: int, tokens: Sequence[int]) -> None:
        """`tokens` of the sequence were computed into new cells."""
        node = self._leaf[sequence_id]
        if node is self._root or node.children or len(node.ends) > 1:
            node.ends.discard(sequence_id)
            child = _Node(node, [])
            node.children.append(child)
            child.ends.add(sequence_id)
            self._leaf[sequence_id] = node = child
        node.tokens.extend(tokens)
        self.cells += len(tokens)

    def truncate(self, sequence_id: int, count: int) -> None:
        """The sequence's last `count` cells, which it shares with nobody, were removed."""
        node = self._leaf[sequence_id]
        if count and (len(node.ends) > 1 or node.children or len(node.tokens) < count):
            raise ValueError(f"sequence {sequence_id} shares its last {count} cells")
        if count:
            del node.tokens[len(node.tokens) - count :]
            self.cells -= count

    def keep(self, sequence_id: int) -> list[int]:
        """The sequence has finished: cache it.  Returns sequences that are now superfluous.

        Those are finished ones whose whole path others share; their cells stay with the others.
        """
        self._cached[sequence_id] = None
        return [other for other in self._cached if self._superfluous(self._leaf[other], other)]

    def reopen(self, sequence_id: int, length: int) -> None:
        """A cached sequence goes on as a live one, with the first `length` of its cells."""
        del self._cached[sequence_id]
        node = self._at(sequence_id, length)
        old = self._leaf[sequence_id]
        if node is not old:
            node.ends.add(sequence_id)
            self._leaf[sequence_id] = node
            self._prune(old, sequence_id)

    def release(self, sequence_id: int) -> None:
        """The sequence was removed from the cache; cells that nobody else shares are free."""
        self._cached.pop(sequence_id, None)
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

    def oldest(self, *, but: int = -1) -> int | None:
        """The cached sequence to evict next, None if there is none (other than `but`)."""
        return next((one for one in self._cached if one != but), None)

    def length(self, sequence_id: int) -> int:
        """How many cells the sequence has, shared ones included."""
        node: _Node | None = self._leaf[sequence_id]
        length = 0
        while node is not None:
            length += len(node.tokens)
            node = node.parent
        return length

    def live_cells(self, *, but: int = -1) -> int:
        """Cells of live sequences (other than `but`); the others can be had by evicting."""
        if not self._cached and but < 0:
            return self.cells
        seen: set[int] = set()
        cells = 0
        for sequence_id, leaf in self._leaf.items():
            live = sequence_id not in self._cached and sequence_id != but
            node: _Node | None = leaf if live else None
            while node is not None and id(node) not in seen:
                seen.add(id(node))
                cells += len(node.tokens)
                node = node.parent
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
                    raise AssertionError("a node belongs to nobody")
                if any(child.parent is not node for child in node.children):
                    raise AssertionError("a child has another parent")
        if cells != self.cells:
            raise AssertionError(f"{self.cells} cells are counted, {cells} are in the tree")
        if ends != self._leaf or not set(self._cached) <= set(ends):
            raise AssertionError("the sequences and the tree disagree")

    # -- the tree ------------------------------------------------------------------------------

    def _at(self, sequence_id: int, length: int) -> _Node:
        """The node at which the first `length` cells of the sequence end, made by a split."""
        path = [self._leaf[sequence_id]]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        for node in reversed(path):
            if length <= len(node.tokens):
                return node if length == len(node.tokens) else self._split(node, length)
            length -= len(node.tokens)
        raise ValueError(f"sequence {sequence_id} is shorter than that by {length}")

    def _split(self, node: _Node, length: int) -> _Node:
        upper = _Node(node.parent, node.tokens[:length])
        upper.children.append(node)
        if node.parent is not None:
            node.parent.children[node.parent.children.index(node)] = upper
        node.parent, node.tokens = upper, node.tokens[length:]
        return upper

    def _merge(self, node: _Node | None) -> None:
        """A node with one child and no end of its own is one edge with it."""
        if node is None or node.parent is None or node.ends or len(node.children) != 1:
            return
        child = node.children[0]
        child.tokens = node.tokens + child.tokens
        child.parent = node.parent
        node.parent.children[node.parent.children.index(node)] = child

    def _superfluous(self, node: _Node, sequence_id: int) -> bool:
        return bool(node.children) or any(
            other != sequence_id and (other not in self._cached or other > sequence_id)
            for other in node.ends
        )

    def _somebody(self, node: _Node) -> int:
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
