"""A service manager's end of sd_notify(3): a socket, and what a service has sent to it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Self

from tests.support.process_box import wait_until

_MAX_BYTES = 4096


class NotifySocket:
    """`address` is for NOTIFY_SOCKET: a path, or with "@" an abstract name.  `messages` are those
    that have come, each with its assignments."""

    def __init__(self, address: Path | str) -> None:
        self.address = str(address)
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = self.address
        self._socket.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        self._thread = threading.Thread(target=self._receive, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RD)  # which ends the waiting
        self._thread.join()
        self._socket.close()

    def environment(self, watchdog_seconds: float = 0.0) -> dict[str, str]:
        """What systemd gives to a service of its own."""
        more = {"WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))} if watchdog_seconds else {}
        return {"NOTIFY_SOCKET": self.address, **more}

    def having(self, name: str) -> list[dict[str, str]]:
        return [message for message in self.messages if name in message]

    def wait_for(self, name: str, count: int = 1) -> dict[str, str]:
        """The message number `count` that has an assignment of that name."""
        wait_until(lambda: len(self.having(name)) >= count, f"{name} number {count}")
        return self.having(name)[count - 1]

    def wait_for_status(self, part: str) -> None:
        wait_until(
            lambda: any(part in message.get("STATUS", "") for message in self.messages),
            f"a status with '{part}'",
        )

    def _receive(self) -> None:
        while data := self._socket.recv(_MAX_BYTES):
            lines = data.decode().splitlines()
            self.messages.append(dict(line.split("=", 1) for line in lines))


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def abstract_name() -> str:
    return f"@pinaivu-test-{os.getpid()}-{os.urandom(4).hex()}"
