"""Tokens to text for one sequence, as a stream: whole characters only, never a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from pinaivu_box.chat_format import overlap


class Detokenizer:
    """`push` tokens one by one; it returns the text that is now certain.

    Bytes of an unfinished UTF-8 character wait for the next token, and text that may be the
    beginning of a stop string waits until it is known not to be one.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: list[str]) -> None:
        self._piece = piece
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    @property
    def holds(self) -> bool:
        """Whether text or bytes wait for more."""
        return bool(self._held or self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """Text that may be sent.  Once `stopped` is True, all before the stop string was given."""
        return self._take(self._decoder.decode(self._piece(token)))

    def flush(self) -> str:
        """The sequence has ended otherwise: all that was held back."""
        text = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        held = self._held + text
        # The stop string that is complete first ends the text, however the tokens cut it.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            _, at, self.stop_string = min(found)
            self._held = ""
            return held[:at]
        keep = max(overlap(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
