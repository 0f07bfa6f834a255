"""Incremental parsers of HTTP/1.1 responses and server-sent events.

They do little, because the time per chunk limits the number of streams.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

from pinaivu_box.text import number

_MAX_HEAD_BYTES = 64 * 1024  # of a status line and headers


class WireError(ValueError):
    """The bytes are not an HTTP/1.1 response."""


class ResponseParser:
    """Parses one response: `feed` returns bytes of the body; `status` is 0 before the head.

    The methods that are generators stop where they need more bytes; `feed` continues them.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._data = b""
        self._at = 0  # what is before it in `_data` is parsed
        self._body: list[bytes] = []
        self._ends_with_connection = False
        self._parsing = self._parse()

    def end(self) -> bool:
        """Note the end of the connection; returns whether the response is complete."""
        self.done = self.done or self._ends_with_connection
        return self.done

    def feed(self, data: bytes) -> bytes:
        """Parse more bytes; returns those of the body.  Raises WireError."""
        self._data, self._at = self._data[self._at :] + data, 0
        self._body = []
        next(self._parsing, None)
        return b"".join(self._body)

    def _parse(self) -> Iterator[None]:
        status = 100
        while status < 200:  # 100 Continue and others: the response follows
            status = yield from self._head()
        self.status = status
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            yield from self._chunks()
        elif status not in (204, 304):
            size = number(length) if length else sys.maxsize
            if size is None:
                raise WireError(f"a content-length of '{length}'")
            self._ends_with_connection = not length
            yield from self._take(size)
        self.done = True

    def _head(self) -> Generator[None, None, int]:
        """Parse the status line and the headers; returns the status."""
        while (end := self._data.find(b"\r\n\r\n", self._at)) < 0:
            start = self._data[self._at : self._at + _MAX_HEAD_BYTES + 1]
            if len(start) > _MAX_HEAD_BYTES or not start.startswith(b"HTTP/1."[: len(start)]):
                raise WireError("no HTTP/1.1 answer")
            yield
        first, *lines = self._data[self._at : end].decode("latin-1").split("\r\n")
        self._at = end + 4
        version, _, rest = first.partition(" ")
        status = number(rest[:3])
        if not version.startswith("HTTP/1.") or status is None:
            raise WireError("no HTTP/1.1 status line")
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return status

    def _chunks(self) -> Iterator[None]:
        while size := _chunk_size((yield from self._line())):
            yield from self._take(size)
            if (yield from self._line()):
                raise WireError("a chunk longer than its size")
        while (yield from self._line()):  # trailers
            pass

    def _line(self) -> Generator[None, None, bytes]:
        while (end := self._data.find(b"\n", self._at)) < 0:
            if len(self._data) - self._at > _MAX_HEAD_BYTES:
                raise WireError("a chunk without a size")
            yield
        line = self._data[self._at : end]
        self._at = end + 1
        return line.rstrip(b"\r")

    def _take(self, size: int) -> Iterator[None]:
        """Move so many bytes to the body, as they arrive."""
        while size > 0:
            piece = self._data[self._at : self._at + size]
            self._body.append(piece)
            self._at += len(piece)
            size -= len(piece)
            if size > 0:
                yield


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise WireError(f"a chunk size of '{line[:20].decode('latin-1')}'") from None


class EventParser:
    """Parses server-sent events; `feed` returns the data of complete ones.

    Comments, ids and event names are ignored.  Lines end with LF or CRLF (a lone CR, which the
    standard also allows, is not used in practice).
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        lines = (self._rest + body).split(b"\n") if self._rest else body.split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and line in (b"", b"\r"):
                events.append(b"\n".join(self._data))
                self._data = []
        return events
