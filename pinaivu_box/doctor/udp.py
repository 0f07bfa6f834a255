"""Checks whether a QUIC endpoint answers at an address.

The probe is a packet of a reserved version: every QUIC endpoint answers it with the versions that
it supports (RFC 9000, section 6), before any key is checked.  So a firewall, a program that does
not run and one that does can be told apart.
"""

from __future__ import annotations

import os
import socket
from typing import Literal

from pinaivu_box.text import host_and_port

Answer = Literal["answers", "closed", "silent", "no route", "unknown name"]
_VERSION = bytes.fromhex("1a2a3a4a")  # reserved for this (RFC 9000, section 15)
_MIN_PACKET_BYTES = 1200  # of a first packet


def ask(address: str, seconds: float) -> Answer:
    """Probe HOST:PORT or [IPv6]:PORT.  "closed": the machine answers, but nothing listens."""
    try:
        host, port = host_and_port(address)
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except (OSError, ValueError):
        return "unknown name"
    with socket.socket(family, kind) as probe:
        probe.settimeout(seconds / 2)
        try:
            probe.connect(where)
            for _ in range(2):  # packets get lost
                probe.send(_packet())
                try:
                    if probe.recv(2048)[1:5] == bytes(4):  # version negotiation
                        return "answers"
                except TimeoutError:
                    continue
        except ConnectionRefusedError:
            return "closed"
        except OSError:
            return "no route"
    return "silent"


def _packet() -> bytes:
    key = b"\x08" + os.urandom(8)
    return (b"\xc0" + _VERSION + key + key).ljust(_MIN_PACKET_BYTES, b"\0")
