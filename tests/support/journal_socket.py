"""The journal's end of its native protocol: a socket, and the entries that have come."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Self

from tests.support.process_box import wait_until

_MAX_BYTES = 1 << 20


class JournalSocket:
    """`entries` are those that have come, each with the texts of its fields."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._receive, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._socket.close()

    def environment(self, stream: Path) -> dict[str, str]:
        """For a process whose output goes to that file, as systemd gives it to a service whose
        output goes to the journal."""
        status = stream.stat()
        return {
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
            "PINAIVU_JOURNAL_SOCKET": str(self.path),
        }

    def wait_for(self, **fields: str) -> dict[str, str]:
        """The first entry with these fields."""

        def found() -> dict[str, str] | None:
            return next((each for each in self.entries if fields.items() <= each.items()), None)

        entry: dict[str, str] = wait_until(found, f"an entry with {fields}")
        return entry

    def _receive(self) -> None:
        while True:
            data, handles, _, _ = socket.recv_fds(self._socket, _MAX_BYTES, 1)
            if not data and not handles:
                return
            for handle in handles:
                data = _content(handle)
            self.entries.append(_parsed(data))


def _content(handle: int) -> bytes:
    """What is in a file that was sent; it has to be sealed, as journald demands."""
    with open(handle, "rb") as file:
        with contextlib.suppress(OSError):
            os.write(handle, b"x")
            raise AssertionError("the file can still be written")
        file.seek(0)
        return file.read()


def _parsed(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, separator, value = line.partition(b"=")
        if not separator:
            (length,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        fields[name.decode()] = value.decode()
    return fields
