"""Which of the requests that peers served are audited.  Pure.

A request is chosen after its answer, by a number from 0 to 1 that HMAC-SHA256 makes of a secret and
its id: a share of all are below that share, and nobody without the secret knows which.  Of what a
peer serves first, and after an audit of it has failed, the share is `[audit] first`, later
`[audit] sample`.
"""

from __future__ import annotations

import hmac

from pinaivu_box.config import AuditConfig
from pinaivu_box.store.peer_tables import PeerAudits

FIRST_REQUESTS = 200
_BYTES = 6  # exact in a float
_NUMBERS: int = 256**_BYTES


class AuditChoice:
    """`secret` must be known to nobody else: whoever has it knows when to be honest."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def number(self, request_id: str) -> float:
        """From 0 to below 1, the same whenever it is asked."""
        digest = hmac.digest(self._secret, request_id.encode(), "sha256")
        return int.from_bytes(digest[:_BYTES]) / _NUMBERS

    def is_chosen(self, request_id: str, peer: PeerAudits, config: AuditConfig) -> bool:
        """Whether to audit the request, given what is known of the peer that served it."""
        return self.number(request_id) < share(peer, config)


def share(peer: PeerAudits, config: AuditConfig) -> float:
    """The share of the peer's requests that is audited now."""
    return config.first if peer.watched < FIRST_REQUESTS else config.sample
