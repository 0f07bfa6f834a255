"""The short way of a stream's chunks to the socket, for what is said at every token.

A message of ASGI passes a dozen coroutines on its way there, of middleware and of Hypercorn, all of
which do nothing with the further chunks of a body.  So the connection offers, as an extension of
ASGI, to write one itself, at once.  Whoever streams uses that once the answer has begun, while all
that it has sent the usual way has been written; the usual way waits for slow readers.
"""

from __future__ import annotations

from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "pinaivu.chunks"


class ChunkWriter(Protocol):
    """Of one connection."""

    written: int  # chunks so far

    @property
    def ready(self) -> bool:
        """Whether a chunk would be written at once: the connection is open, and its client has read
        all that the kernel cannot hold."""
        ...

    def write(self, data: bytes) -> None:
        """Write a chunk of the body of an answer that has no length."""
        ...


def chunk_writer(scope: Scope) -> ChunkWriter | None:
    """None where there is only the usual way: for HTTP/1.0, HTTP/2 and other servers."""
    return cast("ChunkWriter | None", (scope.get("extensions") or {}).get(EXTENSION))
