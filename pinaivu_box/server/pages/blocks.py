"""Where a Markdown text can be cut: the blocks at its outermost level, found line by line.

Each block can be rendered alone, with the same result as in the whole text, so a text that grows
is rendered once, block by block.  Where it is not clear that a block ends, it goes on: a list keeps
its items together.  What is too long is cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

LONG_LIST = 4_000  # characters, after which a list is cut between its items
LONGEST = 8_000  # characters, after which any block but a fence is cut at the end of a line

_FENCE = re.compile(r" {0,3}(?P<mark>`{3,}(?=[^`]*(?![\s\S]))|~{3,})[ \t]*(?P<info>.*)")
_RULE = re.compile(
    r" {0,3}(?:-[ \t]*-[ \t]*-[-\t ]*|\*[ \t]*\*[ \t]*\*[* \t]*|_[ \t]*_[ \t]*_[_ \t]*)"
)
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|(?![\s\S]))")
_ITEM = re.compile(
    r"(?P<indent> {0,3})(?P<mark>[-+*]|(?P<number>[0-9]{1,9})[.)])(?P<space>[ \t]+|(?![\s\S]))"
)


@dataclass(slots=True)
class Fence:
    """A fenced block of code, whose end may not be known yet."""

    mark: str
    indent: int
    language: str
    lines: list[str] = field(default_factory=list)

    def closes(self, line: str) -> bool:
        bare = line.strip(" \t")
        indent = _indent(line)
        return indent <= 3 and len(bare) >= len(self.mark) and set(bare) == {self.mark[0]}

    def might_close(self, line: str) -> bool:
        """Whether a line that is not whole could become the end."""
        return _indent(line) <= 3 and set(line.strip(" \t")) <= {self.mark[0]}

    def without_indent(self, line: str) -> str:
        """A line of the code: as many spaces fewer as the fence is indented."""
        return line[min(self.indent, len(line) - len(line.lstrip(" "))) :]


@dataclass(slots=True)
class Block:
    """Lines of Markdown that are rendered together, or a fence."""

    text: str = ""
    fence: Fence | None = None


class Splitter:
    """Takes whole lines and gives the blocks that have ended."""

    def __init__(self) -> None:
        self.fence: Fence | None = None  # the open one
        self.lines: list[str] = []  # of the open block, if that is no fence
        self._size = 0
        self._blank = False  # after the lines
        self._kind: Literal["text", "code", "list"] = "text"
        self._offset = 0  # of a list: where the text of its last item begins

    def add(self, line: str) -> list[Block]:
        """A line without its end; returns the blocks that it ends, one or two or none."""
        if self.fence is not None:
            if self.fence.closes(line):
                return self.end()
            self.fence.lines.append(self.fence.without_indent(line))
            return []
        if not line.strip(" \t"):
            self._blank = bool(self.lines)
            return []
        ended = self.end() if self.lines and self._begins_block(line) else []
        inside_item = self._kind == "list" and bool(self.lines) and _indent(line) >= self._offset
        fence = None if inside_item else _FENCE.fullmatch(line)
        if fence is not None:
            language = (fence["info"].split() or [""])[0]
            self.fence = Fence(fence["mark"], _indent(line), language)
            return ended
        if self._blank:
            self._append("")
            self._blank = False
        first = not self.lines
        self._append(line)
        if not inside_item:
            if self._alone(line, first=first):
                return ended + self.end()
            self._classify(line, first=first)
        return ended

    def end(self) -> list[Block]:
        """The open block ends here."""
        block = Block("\n".join(self.lines), self.fence)
        was_open = bool(self.lines) or self.fence is not None
        self.fence, self.lines, self._size, self._blank = None, [], 0, False
        self._kind = "text"
        return [block] if was_open else []

    def _append(self, line: str) -> None:
        self.lines.append(line)
        self._size += len(line) + 1

    def _begins_block(self, line: str) -> bool:
        """Whether the line cannot belong to the open block."""
        indent = _indent(line)
        if self._size > LONGEST:
            return True
        if self._kind == "list":
            if indent >= self._offset:
                return False
            if _ITEM.match(line) and not _RULE.fullmatch(line):
                return self._size > LONG_LIST
        elif self._kind == "code" and indent >= 4:
            return False
        return self._blank or bool(_FENCE.fullmatch(line) or _HEADING.match(line))

    @staticmethod
    def _alone(line: str, *, first: bool) -> bool:
        """Whether a line at the outermost level is the last one of its block."""
        return bool(_HEADING.match(line) or _RULE.fullmatch(line)) or (
            not first and bool(re.fullmatch(r" {0,3}-+[ \t]*", line))
        )

    def _classify(self, line: str, *, first: bool) -> None:
        item = _ITEM.match(line)
        if first:
            self._kind = "code" if _indent(line) >= 4 else "text"
        if item is None:
            return
        in_paragraph = not first and self._kind == "text"
        if in_paragraph and (item.end() == len(line) or item["number"] not in (None, "1")):
            return  # such an item does not end a paragraph
        self._kind = "list"
        space = len(item["space"].expandtabs(4))
        width = len(item["indent"]) + len(item["mark"])
        self._offset = width + (space if 1 <= space <= 4 and item.end() < len(line) else 1)


def _indent(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip(" "))
