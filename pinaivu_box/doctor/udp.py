"""Does anything that speaks QUIC answer at an address?

The question is a packet of a version that nobody speaks: any QUIC endpoint must answer it with the
versions that it does (RFC 9000, section 6), before any key is looked at.  So this tells a firewall
from a program that is not there, and both from one that is.
"""

from __future__ import annotations

import os
import socket
from typing import Literal

from pinaivu_box.text import number

Answer = Literal["answers", "closed", "silent", "no route", "unknown name"]
_VERSION = bytes.fromhex("1a2a3a4a")  # reserved for exactly this (RFC 9000, section 15)
_SMALLEST = 1200  # bytes of a first packet


def ask(address: str, seconds: float) -> Answer:
    """`address` is HOST:PORT or [V6]:PORT.  "closed": the machine is there, and nothing listens."""
    host, _, text = address.rpartition(":")
    if (port := number(text)) is None:
        return "unknown name"
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_DGRAM
        )[0]
    except (OSError, ValueError):
        return "unknown name"
    with socket.socket(family, kind) as asking:
        asking.settimeout(seconds / 2)
        try:
            asking.connect(where)
            for _ in range(2):  # packets get lost
                asking.send(_question())
                try:
                    if asking.recv(2048)[1:5] == bytes(4):  # version negotiation
                        return "answers"
                except TimeoutError:
                    continue
        except ConnectionRefusedError:
            return "closed"
        except OSError:
            return "no route"
    return "silent"


def _question() -> bytes:
    key = b"\x08" + os.urandom(8)
    return (b"\xc0" + _VERSION + key + key).ljust(_SMALLEST, b"\0")
