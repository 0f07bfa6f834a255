"""Log records to systemd's journal by its native protocol, so that each field can be searched for:
`journalctl REQUEST_ID=req_...`.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL
"""

from __future__ import annotations

import array
import errno
import logging
import os
import re
import socket
import string
import struct
import sys
from collections.abc import Iterator, Mapping

_SOCKET = "/run/systemd/journal/socket"
_SOCKET_VARIABLE = "PINAIVU_JOURNAL_SOCKET"  # another one, for tests
_IDENTIFIER = "pinaivu"
_MAX_NAME_CHARS = 64
_MAX_VALUE_BYTES = 64 << 10
_SEND_SECONDS = 1.0  # a journal that does not read for so long misses a record
_DIGITS = frozenset(string.digits)
_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]")
# Of systemd.journal-fields(7), those that ours could be confused with.
_RESERVED = frozenset(
    (
        *("MESSAGE", "MESSAGE_ID", "PRIORITY", "CODE_FILE", "CODE_LINE", "CODE_FUNC", "ERRNO"),
        *("INVOCATION_ID", "USER_INVOCATION_ID", "DOCUMENTATION", "TID", "UNIT", "USER_UNIT"),
        *("SYSLOG_FACILITY", "SYSLOG_IDENTIFIER", "SYSLOG_PID", "SYSLOG_TIMESTAMP", "SYSLOG_RAW"),
        *("LOGGER", "LEVEL", "EXCEPTION"),
    )
)
# Of syslog(3).
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7


def is_journal(descriptor: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the journal reads what is written to that file descriptor: systemd says in the
    environment which file that is, and whoever redirects it has another."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records, whose text its formatter makes."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__()
        self._address = environ.get(_SOCKET_VARIABLE) or _SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_SEND_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            try:
                self._send(b"".join(_fields(record, message)))
            except OSError:  # the journal starts anew, for example: the other way into it may work
                print(message, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._address)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """What is too large for a datagram, in a sealed file in memory."""
        import fcntl

        handle = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(handle, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [handle]))
            self._socket.sendmsg([], [rights], 0, self._address)
        finally:
            os.close(handle)


def _fields(record: logging.LogRecord, message: str) -> Iterator[bytes]:
    yield _field("MESSAGE", message)
    yield _field("PRIORITY", _priority(record.levelno))
    yield _field("SYSLOG_IDENTIFIER", _IDENTIFIER)
    yield _field("LOGGER", record.name)
    for name, value in getattr(record, "fields", {}).items():
        if value is not None and (field := field_name(name)):
            yield _field(field, value)


def field_name(name: str) -> str:
    """The journal's name for a field of ours; "" if it can have none."""
    upper = _NOT_IN_NAMES.sub("_", name.upper()).lstrip("_")
    if upper in _RESERVED or upper[:1] in _DIGITS:
        upper = f"PINAIVU_{upper}"
    return upper[:_MAX_NAME_CHARS]


def _field(name: str, value: object) -> bytes:
    data = str(value).encode(errors="backslashreplace")[:_MAX_VALUE_BYTES]
    if b"\n" in data:
        return b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(data)), data)
    return b"%b=%b\n" % (name.encode(), data)


def _priority(level: int) -> int:
    return next((code for least, code in _PRIORITIES if level >= least), _DEBUG_PRIORITY)
