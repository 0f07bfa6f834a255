"""Large messages of peers, looked at in a child process before they are decoded here.

A message may have 16 MB, and as many numbers: that takes a second to decode, with the interpreter's
lock held, and ten times the memory.  So the child says first whether it is a message at all, and
of no more values than are quickly decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pinaivu_box.errors import ProtocolError
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.sandbox import SandboxLimit, SandboxLimits, SandboxPool
from pinaivu_box.value_count import exceeds

ENTRY = "pinaivu_box.legs.large_messages:make"
LARGE = 256 * 1024  # bytes; a smaller one is decoded within some milliseconds
MAX_VALUES = 262_144  # log-probabilities have many
MAX_NUMBERS = leg_wire.MAX_TOKENS + 65_536  # one long prompt, decoded in 60 ms
_LIMITS = SandboxLimits(cpu_seconds=20.0, memory_bytes=1024 * 1024 * 1024, wall_seconds=60.0)
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    b"S": leg_wire.to_serving,
    b"C": leg_wire.to_coordinator,
}


class LargeMessages:
    def __init__(self) -> None:
        self._pool = SandboxPool(ENTRY, limits=_LIMITS, size=1)

    def to_serving(self, peer: str) -> leg_wire.Check:
        return self._checked(peer, b"S")

    def to_coordinator(self, peer: str) -> leg_wire.Check:
        return self._checked(peer, b"C")

    def close(self) -> None:
        self._pool.close()

    def _checked(self, peer: str, kind: bytes) -> leg_wire.Check:
        async def check(body: bytes) -> None:
            if len(body) <= LARGE:
                return
            try:
                why = await self._pool.run_async(kind + body, tenant=peer)
            except SandboxLimit as error:
                raise ProtocolError("a message takes too much time or memory") from error
            if why:
                raise ProtocolError(f"a message is not what was expected: {why.decode()}")

        return check


def make(_setup: bytes) -> Callable[[bytes], bytes]:
    """The child's part: its job says what is wrong with a message, if anything is."""

    def run(payload: bytes) -> bytes:
        kind, body = payload[:1], memoryview(payload)[1:]
        try:
            raw = msgspec.msgpack.decode(body)
            # The names in an object are the peer's own.
            if exceeds(raw, MAX_VALUES, MAX_NUMBERS, count_names=True):
                return b"it has too many values"
            _DECODERS[kind].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return str(error)[:200].encode()
        return b""

    return run
