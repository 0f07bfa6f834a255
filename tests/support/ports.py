"""Ports that are free."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

from pinaivu_box.transport.iroh_transport import has_ipv6

_ports = itertools.count()


def free_port(kind: socket.SocketKind = socket.SOCK_DGRAM) -> int:
    """Of UDP unless another kind is asked for; one that stays, so that who starts again is found
    there: none that the kernel gives to whoever asks for any, nor another worker's of the tests."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 1_000 * (worker % 12) + next(_ports) % 1_000
        with suppress(OSError):
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                if family == socket.AF_INET6 and not has_ipv6():
                    continue
                with socket.socket(family, kind) as trial:
                    trial.bind((host, port))
            return port
