"""What a service tells its manager, by the protocol of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

from pinaivu_box.text import number

_SEND_SECONDS = 1.0  # a manager that does not read for so long misses a notification


class Notifier:
    """Sends notifications to the socket at `address`; with "" there is no manager, and nothing is
    sent.  Within every `watchdog_seconds` the manager expects `alive`; 0: it does not."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds
        self._status = ""

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """The manager that the environment names.  The variables are removed from it: child
        processes are no services."""
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        process = environ.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return cls()
        ours = not process or process == str(os.getpid())
        return cls(address, (number(interval) or 0) / 1e6 if ours else 0.0)

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        self._status = status
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self) -> None:
        """A reload begins; it has ended with the next `ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self._status = status
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`; sent if it has changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={_line(status)}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Let what runs now, the start or the stop, take so many more seconds from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A manager that is gone must not stop the service.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, _DATAGRAM) as sender:
            sender.settimeout(_SEND_SECONDS)
            sender.sendto(text.encode(), self._address)


def _line(text: str) -> str:
    return " ".join(text.split())


_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
