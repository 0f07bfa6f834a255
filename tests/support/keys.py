"""Keys of boxes: the same ones in every run, and new ones."""

from __future__ import annotations

import hashlib

from nacl.signing import SigningKey

from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import network_of


def known_identity(number: int) -> Identity:
    return Identity(SigningKey(hashlib.sha256(b"%d" % number).digest()))


IDENTITIES = [known_identity(number) for number in range(8)]
FOUNDER = IDENTITIES[0]
NETWORK = network_of(FOUNDER.node_id, b"\0\1\2\3")
OTHER_NETWORK = network_of(FOUNDER.node_id, b"\3\2\1\0")


def new_identity() -> Identity:
    return Identity(SigningKey.generate())
