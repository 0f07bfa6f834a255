"""What goes over a link, byte by byte.

**Connection.**  QUIC by iroh (UDP; TLS 1.3 with raw Ed25519 keys, RFC 7250).  The key of either
side is its box's identity: `node_` and 64 hex digits in our texts.  The ALPN `pinaivu/box/1` stands
for everything on this page; it changes only if this page no longer holds.  The version of the
frames' contents is agreed on in the Hello.

**Streams.**  Bidirectional QUIC streams, opened by either side, at most `MAX_STREAMS` of each side
at a time.  A stream's receive window is QUIC's usual 1.25 MB.  Nothing else is used but datagrams
for heartbeats.

**Frames.**  A stream is, each way, a sequence of frames: 4 bytes of length, little-endian, then so
many bytes, 1 to `MAX_FRAME_BYTES`.  Length 0 is the end frame: its sender sends no more, and
finishes its half of the QUIC stream.  Who abandons a stream sends RESET_STREAM and STOP_SENDING; a
half that is finished without an end frame was abandoned as well.  A frame that is announced as
longer is not read: it closes the link.

**Hello.**  Who made the connection opens a stream and sends a `Hello`; the other side answers with
its own, and both finish.  The highest version that both support is used from then on.  If there is
none, the side that sees it closes with `Code.VERSION` and a sentence for the other's operator.  A
Hello has at most `MAX_HELLO_BYTES`, and 10 s to arrive.  Fields that a reader does not know are
skipped, so it can grow.

**Purposes.**  Every stream after that begins with an `Open`, which says what it is for; the frames
after it belong to that purpose.  The other side goes on with the conversation, or answers a
`Refusal` and finishes: the link stays.

**Heartbeats.**  Each side sends a datagram of one byte, 0, each second, which the other's QUIC
acknowledges.  A side that has received nothing at all for four heartbeats of its own, or for 30 of
them nothing from the other's program, neither datagram nor stream, closes with `Code.SILENT`.  A
heartbeat of its own that was late starts both counts anew.  Heartbeats are datagrams because
streams wait for their readers.

**End.**  CONNECTION_CLOSE with a `Code` and a reason: one sentence in UTF-8, at most
`MAX_REASON_BYTES`, written for an operator to read.

**Frames' contents** are msgpack maps (msgspec's tagged structs): `type` names the struct, the rest
are its fields.  One stream is one conversation, with a union of its own.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.errors import ProtocolError
from pinaivu_box.text import NO_CONTROLS

NAME = "pinaivu/box/1"  # the ALPN
VERSIONS = (1,)  # that this box supports
PURPOSE_VERSION = 1  # of the frames of every purpose
LENGTH = struct.Struct("<I")
END_FRAME = LENGTH.pack(0)
BEAT = b"\0"
MAX_FRAME_BYTES = 1024 * 1024
MAX_HELLO_BYTES = 4096
MAX_REASON_BYTES = 500
MAX_OPEN_BYTES = 256  # a purpose is short
MAX_STREAMS = 128  # open at a time, of each side of a link

T = TypeVar("T")


class Code(IntEnum):
    """Why a link was closed.  After one of `REFUSED` it is useless to try again soon."""

    DROPPED = 0  # QUIC's own: the process dropped the connection without closing it
    SHUTDOWN = 1
    PROTOCOL = 400
    FORBIDDEN = 403
    SILENT = 408
    SECOND = 409  # both dialed at once, or one was restarted: there is another link
    REVOKED = 410  # as FORBIDDEN, to a box that was a member
    VERSION = 426
    BUSY = 429


REFUSED = frozenset({Code.PROTOCOL, Code.FORBIDDEN, Code.REVOKED, Code.VERSION})


class Hello(Struct, frozen=True, tag=True):
    """`clock` is the sender's wall clock, in seconds since 1970."""

    versions: Annotated[tuple[int, ...], Meta(min_length=1, max_length=16)]
    software: Annotated[str, Meta(max_length=64, pattern=NO_CONTROLS)]
    clock: Annotated[float, Meta(ge=0, le=2**53)]


class Open(Struct, frozen=True, tag="Open"):
    """`v` is the version of that purpose's frames."""

    purpose: Annotated[str, Meta(min_length=1, max_length=32)]
    v: Annotated[int, Meta(ge=1)] = PURPOSE_VERSION


class Refusal(Struct, frozen=True, tag="Refusal"):
    """`code` is a `Code`, `message` a sentence for an operator."""

    code: int
    message: Annotated[str, Meta(max_length=MAX_REASON_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_hello = msgspec.msgpack.Decoder(Hello)
_open = msgspec.msgpack.Decoder(Open)


def encode(message: Struct) -> bytes:
    """Return the message as the content of a frame."""
    return _encoder.encode(message)


def frame(content: bytes) -> bytes:
    """Return the frame with that content, as it goes over a stream."""
    return LENGTH.pack(len(content)) + content


def decode(frame: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Read a frame.  Raises ProtocolError if it is none of the decoder's messages."""
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a frame is not what was expected: {error}") from error


def decode_hello(frame: bytes) -> Hello:
    """Read a Hello.  Raises ProtocolError."""
    return decode(frame, _hello)


def decode_open(frame: bytes | None) -> Open:
    """Read a stream's first frame; None is the end of the stream.  Raises ProtocolError."""
    return decode((frame or b"")[: MAX_OPEN_BYTES + 1], _open)


def short(node_id: str) -> str:
    """Return the beginning of a node id, for sentences."""
    return node_id[:13]


def printable(text: str) -> str:
    """Return a peer's text as an operator may see it: one line, and nothing that moves a cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def cut(reason: str) -> bytes:
    """Return a reason as it is sent: UTF-8, no longer than allowed, no half character."""
    encoded = reason.encode(errors="replace")
    return encoded[:MAX_REASON_BYTES].decode(errors="ignore").encode()
