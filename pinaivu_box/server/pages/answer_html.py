"""An answer as a page shows it while it is written: blocks of HTML instead of pieces of text."""

from __future__ import annotations

import time

from msgspec import Struct

from pinaivu_box.server.pages.markdown import BlockRenderer, Update

_MIN_SECONDS = 0.1  # between two updates
_RENDERING_SHARE = 0.04  # of the time: an open block that takes long is rendered less often
_BYTES_PER_SECOND = 250_000


class Blocks(Struct, frozen=True, omit_defaults=True):
    """What a page changes.  `done`, `open`, `append`: see `markdown.Update`.  `thoughts`: plain
    text to append to the thoughts."""

    done: list[str] = []
    open: str | None = None
    append: str = ""
    thoughts: str = ""


class AnswerHtml:
    """Takes the text of one answer and gives updates, not more often than a page can use them."""

    def __init__(self) -> None:
        self._text = BlockRenderer()
        self._thoughts: list[str] = []
        self._next = 0.0

    def text(self, piece: str) -> None:
        self._text.feed(piece)

    def thoughts(self, piece: str) -> None:
        self._thoughts.append(piece)

    def wait_seconds(self) -> float:
        """Until the next update is due; 0 if it is."""
        return max(0.0, self._next - time.monotonic())

    def update(self) -> Blocks | None:
        """What has changed, or None if nothing has."""
        began = time.monotonic()
        blocks = self._blocks(self._text.update())
        ended = time.monotonic()
        sent = len(blocks.open or "") if blocks else 0
        pause = max(_MIN_SECONDS, (ended - began) / _RENDERING_SHARE, sent / _BYTES_PER_SECOND)
        self._next = ended + min(pause, 5.0)
        return blocks

    def finish(self) -> Blocks | None:
        """The last change."""
        return self._blocks(self._text.finish())

    def _blocks(self, update: Update) -> Blocks | None:
        thoughts, self._thoughts = "".join(self._thoughts), []
        if not update and not thoughts:
            return None
        return Blocks(update.done, update.open, update.append, thoughts)
