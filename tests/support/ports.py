"""Ports that are free, and stay so for this process."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import ExitStack

from pinaivu_box.transport.iroh_transport import has_ipv6

_PORTS = 1_000  # for each worker of the tests
_OF_SCRIPTS = range(32_000, 32_768)  # for what runs without pytest; the kernel's own begin above
_ports = itertools.count()
_kept: list[socket.socket] = []  # until this process ends


def free_port(kind: socket.SocketKind = socket.SOCK_DGRAM) -> int:
    """Of UDP unless another kind is asked for; one that stays, so that who starts again is found
    there: none that the kernel gives to whoever asks for any, nor one that another call has got, in
    whatever process.  The port of the same number of the other kind is taken as a sign of that."""
    other = socket.SOCK_STREAM if kind == socket.SOCK_DGRAM else socket.SOCK_DGRAM
    ports = _own_ports()
    for number in itertools.islice(_ports, len(ports)):
        port = ports[number % len(ports)]
        sign = _bound(socket.AF_INET, other, port)
        if sign is None:
            continue
        if _is_free(kind, port):
            _kept.append(sign)
            return port
        sign.close()
    raise OSError(f"None of the ports from {ports[0]} to {ports[-1]} is free.")


def _own_ports() -> range:
    if "PYTEST_VERSION" not in os.environ:
        return _OF_SCRIPTS
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + _PORTS * (worker % 12)
    return range(first, first + _PORTS)


def _is_free(kind: socket.SocketKind, port: int) -> bool:
    families = [socket.AF_INET, *([socket.AF_INET6] if has_ipv6() else [])]
    with ExitStack() as trials:
        for family in families:
            if (trial := _bound(family, kind, port)) is None:
                return False
            trials.enter_context(trial)
    return True


def _bound(
    family: socket.AddressFamily, kind: socket.SocketKind, port: int
) -> socket.socket | None:
    """A socket of that port on the loopback; None if another has it."""
    bound = socket.socket(family, kind)
    try:
        bound.bind(("127.0.0.1" if family == socket.AF_INET else "::1", port))
    except OSError:
        bound.close()
        return None
    return bound
