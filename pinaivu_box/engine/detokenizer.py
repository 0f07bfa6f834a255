"""Tokens to text for one sequence, as a stream: whole characters only, never a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import cache

from pinaivu_box.chat_format import overlap


class Detokenizer:
    """`push` tokens one by one; it returns the text that is now certain.

    Bytes of an unfinished UTF-8 character wait for the next token, and are no text if none comes;
    text that may be the beginning of a stop string waits until it is known not to be one.  A stop
    string ends nothing that is complete within the first `min_tokens` tokens.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: list[str], min_tokens: int = 0) -> None:
        self._piece = piece
        self._stop = stop
        self._stop_beginnings = {each[0] for each in stop if each}
        self._decoder = _decoder()
        self._unfinished = False  # whether bytes of a character wait, here or in the decoder
        self._withheld = ""
        self._min_tokens = min_tokens  # still to come
        self._exempt = 0  # characters of the withheld text that such tokens have completed
        self._begun = b""  # of a character, by the prompt
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    @property
    def holds(self) -> bool:
        """Whether text or bytes wait for more."""
        return bool(self._withheld or (self._unfinished and self._decoder.getstate()[0]))

    def follow(self, prompt: bytes) -> None:
        """The end of the prompt: the first token may finish a character that it has begun."""
        before = _decoder()
        before.decode(prompt)
        self._begun = before.getstate()[0]
        self._unfinished = bool(self._begun)

    def push(self, token: int) -> str:
        """Text that may be sent.  Once `stopped` is True, all before the stop string was given."""
        piece = self._piece(token)
        text = None if self._unfinished else _whole_text(piece)
        if text is None:
            text = self._decode(piece)
        if not self._stop:
            return text
        if self.stop_string is not None:
            return ""
        early = self._min_tokens > 0
        self._min_tokens -= early
        if not self._withheld and self._stop_beginnings.isdisjoint(text):
            return text
        return self._take(text, early=early)

    def _decode(self, piece: bytes) -> str:
        if self._begun and piece:
            begun, self._begun = self._begun, b""
            if piece[0] & 0xC0 == 0x80:
                piece = begun + piece
        text = self._decoder.decode(piece)
        self._unfinished = bool(self._begun or self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """The text that was withheld: the sequence has ended, and not by a stop string."""
        text, self._withheld = self._withheld, ""
        return text

    def _take(self, text: str, *, early: bool) -> str:
        text = self._withheld + text
        exempt = len(text) if early else self._exempt
        # The stop string that is complete first ends the text, however the tokens cut it.
        stops = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop, max(0, exempt - len(stop) + 1))) >= 0
        ]
        if stops:
            _, start, self.stop_string = min(stops)
            self._withheld = ""
            return text[:start]
        certain = len(text) - max(overlap(text, stop) for stop in self._stop)
        self._withheld = text[certain:]
        self._exempt = max(0, exempt - certain)
        return text[:certain]


def text_of(data: bytes) -> str:
    """The text of tokens' bytes, up to the last whole character."""
    return _decoder().decode(data)


@cache
def _whole_text(piece: bytes) -> str | None:
    """The text of a token whose bytes are whole characters; None of others.  There are no more
    pieces than tokens in vocabularies."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
