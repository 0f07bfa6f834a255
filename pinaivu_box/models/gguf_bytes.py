"""The bytes of a GGUF file, read in windows, and the values that its header is made of.

Whatever its counts and lengths say, reading takes at most `MAX_ITEMS` steps and `MAX_HEADER_BYTES`
of the file.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from pinaivu_box.models.layer_caches import Scalar

_MAX_STRING_BYTES = 16 * 1024 * 1024
_MAX_VALUE_BYTES = 256  # of a string that is kept
_MAX_NAME_BYTES = 4096  # of keys and tensors; the format allows 65,535
MAX_ITEMS = 4_000_000  # keys, tensors and strings of arrays; the largest vocabularies have 800,000
MAX_HEADER_BYTES = 256 * 1024 * 1024
_WINDOW_BYTES = 1024 * 1024
INCOMPLETE = "it is incomplete"
_CUT_OFF = f"{INCOMPLETE}: it ends in the middle of its header"
NO_ROOM = "more than the file has room for"


class BadGguf(ValueError):
    """The bytes are not a GGUF file that can be served; the message says why, as the end of a
    sentence."""


class GgufBytes:
    """Reads the file in windows, within its bounds.  Raises BadGguf."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self.at = 0  # where in the GGUF the next byte is
        self._window, self._begin = b"", 0  # bytes, and where in the GGUF they are
        self._left = MAX_ITEMS

    def step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise BadGguf(f"its header has more than {MAX_ITEMS:,} entries")

    def take(self, size: int) -> bytes:
        begin = self.at - self._begin
        if begin < 0 or begin + size > len(self._window):
            self._fill(size)
            begin = 0
        self.skip(size)
        return self._window[begin : begin + size]

    def skip(self, size: int) -> None:
        if size > self.size - self.at:
            raise BadGguf(_CUT_OFF)
        self.at += size
        if self.at > MAX_HEADER_BYTES:
            raise BadGguf(f"its header has more than {MAX_HEADER_BYTES >> 20} MiB")

    def skip_strings(self, count: int) -> None:
        """`count` lengths, each with so many bytes after it."""
        if count > (self.size - self.at) // 8:
            raise BadGguf(f"it has an array of {count} strings, {NO_ROOM}")
        self.step(count)
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._fill(8)
            window, at, end = self._window, 0, len(self._window) - 8
            while count and at <= end:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at)

    def _fill(self, size: int) -> None:
        """Move the window here, with at least so many bytes.  Raises BadGguf if the file ends."""
        read_size = min(max(size, _WINDOW_BYTES), max(self.size - self.at, 0))
        self._file.seek(self._offset + self.at)
        data = bytearray()
        while len(data) < read_size and (more := self._file.read(read_size - len(data))):
            data += more
        if len(data) < size:
            raise BadGguf(_CUT_OFF)
        self._window, self._begin = bytes(data), self.at

    # -- values ------------------------------------------------------------------------------------

    def scalar(self, form: str) -> Scalar:
        value: Scalar = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def number(self, form: str) -> int:
        return int(self.scalar(form))

    def name(self) -> str:
        """Of a key or a tensor."""
        length = self.number("<Q")
        if length > _MAX_NAME_BYTES:
            raise BadGguf(f"it has a name of {length} bytes")
        return self.take(length).decode(errors="replace")

    def text(self) -> str | None:
        """A string value; None if it is longer than the box needs (a chat template, say)."""
        length = self.number("<Q")
        if length > _MAX_STRING_BYTES:
            raise BadGguf(f"it has a string of {length} bytes")
        if length <= _MAX_VALUE_BYTES:
            return self.take(length).decode(errors="replace")
        self.skip(length)
        return None
