"""A text that grows by pieces, and that many readers follow from wherever they are."""

from __future__ import annotations

from bisect import bisect_right


class GrowingText:
    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ends: list[int] = []  # in characters, of each piece

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __str__(self) -> str:
        return "".join(self._pieces)

    def add(self, piece: str) -> None:
        if piece:
            self._ends.append(len(self) + len(piece))
            self._pieces.append(piece)

    def since(self, offset: int) -> str:
        """What comes after that many characters."""
        first = bisect_right(self._ends, offset)
        if first == len(self._ends):
            return ""
        start = self._ends[first - 1] if first else 0
        return "".join(self._pieces[first:])[offset - start :]
