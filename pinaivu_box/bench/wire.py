"""Incremental parsers of HTTP/1.1 responses and server-sent events.

They do little, because the time per chunk limits the number of streams.
"""

from __future__ import annotations

from enum import Enum, auto

from pinaivu_box.text import number

_MAX_HEAD_BYTES = 64 * 1024  # of a status line and headers


class WireError(ValueError):
    """The bytes are not an HTTP/1.1 response."""


class _ParserState(Enum):
    HEAD = auto()
    SIZE = auto()  # the line before a chunk
    CHUNK = auto()
    AFTER = auto()  # the line end after a chunk
    TRAILER = auto()
    LENGTH = auto()  # a body with a content-length
    TO_END = auto()  # a body that ends with the connection
    DONE = auto()


class ResponseParser:
    """Parses one response: `feed` returns bytes of the body; `status` is 0 before the head."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._part = _ParserState.HEAD
        self._rest = b""
        self._left = 0

    @property
    def done(self) -> bool:
        return self._part is _ParserState.DONE

    def end(self) -> bool:
        """Note the end of the connection; returns whether the response is complete."""
        if self._part is _ParserState.TO_END:
            self._part = _ParserState.DONE
        return self.done

    def feed(self, data: bytes) -> bytes:
        """Parse more bytes; returns those of the body.  Raises WireError."""
        if self._part is _ParserState.HEAD:
            data = self._head(data)
        if self._part is _ParserState.TO_END:
            return data
        if self._part is _ParserState.LENGTH:
            return self._counted(data)
        if self._part in (_ParserState.HEAD, _ParserState.DONE):
            return b""
        return self._chunked(data)

    def _head(self, data: bytes) -> bytes:
        """Parse the head; returns the bytes after it.  Raises WireError."""
        data = self._rest + data
        head, end, after = data.partition(b"\r\n\r\n")
        if not end:
            if len(data) > _MAX_HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                raise WireError("no HTTP/1.1 answer")
            self._rest = data
            return b""
        self._rest = b""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or number(status[:3]) is None:
            raise WireError("no HTTP/1.1 status line")
        if status.startswith("1"):  # 100 Continue and others: the response follows
            return self._head(after)
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.status = int(status[:3])
        self._begin_body()
        return after

    def _begin_body(self) -> None:
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._part = _ParserState.SIZE
        elif self.status in (204, 304) or length == "0":
            self._part = _ParserState.DONE
        elif length:
            if (size := number(length)) is None:
                raise WireError(f"a content-length of '{length}'")
            self._part, self._left = _ParserState.LENGTH, size
        else:
            self._part = _ParserState.TO_END

    def _counted(self, data: bytes) -> bytes:
        data = data[: self._left]
        self._left -= len(data)
        if not self._left:
            self._part = _ParserState.DONE
        return data

    def _chunked(self, data: bytes) -> bytes:
        if self._rest:
            data, self._rest = self._rest + data, b""
        pieces: list[bytes] = []
        at = 0
        while self._part is not _ParserState.DONE and at < len(data):
            if self._part is _ParserState.CHUNK:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._part = _ParserState.AFTER
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self._rest = data[at:]
                if len(self._rest) > _MAX_HEAD_BYTES:
                    raise WireError("a chunk without a size")
                break
            self._line(data[at:end].rstrip(b"\r"))
            at = end + 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line(self, line: bytes) -> None:
        """Parse a line between chunks: a size, the end of a chunk, or a trailer."""
        if self._part is _ParserState.AFTER:
            if line:
                raise WireError("a chunk longer than its size")
            self._part = _ParserState.SIZE
        elif self._part is _ParserState.TRAILER:
            self._part = _ParserState.TRAILER if line else _ParserState.DONE
        else:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise WireError(f"a chunk size of '{line[:20].decode('latin-1')}'") from None
            self._part = _ParserState.CHUNK if self._left else _ParserState.TRAILER


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
