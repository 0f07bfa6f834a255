"""Reads the headers of model files in a child with limits, and remembers the results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from pinaivu_box.errors import BoxError
from pinaivu_box.models.gguf import Header, read_header
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.regular_files import NotAFile
from pinaivu_box.sandbox import Sandbox, SandboxLimit, SandboxLimits

_ENTRY = "pinaivu_box.models.header_reader:make"
_LIMITS = SandboxLimits(cpu_seconds=10.0, memory_bytes=768 * 1024 * 1024, wall_seconds=60.0)
_MAX_LOOK_SECONDS = 120.0  # that one look may take for the headers of all files together

_Facts = tuple[str, int, int, int, int, int]


class _HeaderResult(Struct, array_like=True):
    """`header`, or why there is none: what is wrong with the bytes, or an error of the system."""

    header: Header | None = None
    bad: str = ""
    error: str = ""


class HeaderReader:
    """For one thread at a time.  `finish` after each look at all files."""

    def __init__(self) -> None:
        self._sandbox = Sandbox(_ENTRY, limits=_LIMITS)
        self._known: dict[_Facts, _HeaderResult] = {}  # from the look before
        self._seen: dict[_Facts, _HeaderResult] = {}  # in this one
        self._ends: float | None = None
        self._stopped = False

    def read(self, path: Path, facts: os.stat_result) -> Header:
        """The header of a file with these facts, from memory while they stay the same.  Raises
        BadGguf, OSError."""
        key = (
            str(path),
            facts.st_dev,
            facts.st_ino,
            facts.st_size,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
        )
        answer = self._seen.get(key) or self._known.get(key) or self._read_file(path)
        self._seen[key] = answer
        if answer.header is None:
            raise BadGguf(answer.bad)
        return answer.header

    def finish(self) -> None:
        """Forget files that are there no more, and end the child."""
        self._known, self._seen, self._ends = self._seen, {}, None
        self._sandbox.close()

    def stop(self) -> None:
        """From another thread: read no more, so that a scan in progress ends soon."""
        self._stopped = True
        self._sandbox.close()

    def _read_file(self, path: Path) -> _HeaderResult:
        """The result of reading the file.  Errors that are not about its bytes are raised, so that
        they are not remembered."""
        self._ends = self._ends or time.monotonic() + _MAX_LOOK_SECONDS
        if self._stopped:
            raise BadGguf("the box stops")
        if time.monotonic() > self._ends:
            raise BadGguf("reading the files before it took too long: reload to go on")
        try:
            reply = self._sandbox.run(os.fsencode(path))
        except SandboxLimit as error:
            raise BadGguf(f"reading its header {error.reason}") from error
        except BoxError as error:
            raise BadGguf(f"its header cannot be read: {error.message.rstrip('.')}") from error
        answer = msgspec.msgpack.decode(reply, type=_HeaderResult)
        if answer.error:
            raise NotAFile(0, answer.error, str(path))
        return answer


def make(_setup: bytes) -> Callable[[bytes], bytes]:
    """In the child: reads one header after the other."""

    def read(path: bytes) -> bytes:
        try:
            answer = _HeaderResult(read_header(Path(os.fsdecode(path))))
        except BadGguf as error:
            answer = _HeaderResult(bad=str(error))
        except OSError as error:
            answer = _HeaderResult(error=error.strerror or str(error))
        return msgspec.msgpack.encode(answer)

    return read
