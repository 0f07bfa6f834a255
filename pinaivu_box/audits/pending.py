"""What is to be audited: in memory only, bounded, gone when the box stops."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace

from pinaivu_box.receipts.commitment import Opening
from pinaivu_box.receipts.receipt import Proof, SignedProof

MAX_AUDITS = 64
MAX_OF_PEER = 16
MAX_BYTES = 32 * 1024 * 1024
MAX_BYTES_OF_PEER = MAX_BYTES // 4
MAX_ATTEMPTS = 5  # of one that requests interrupt


@dataclass(frozen=True)
class LegToAudit:
    """A leg as the peer signed it, with what opens its commitments."""

    proof: Proof
    signed: SignedProof
    prompt: Opening
    output: Opening


@dataclass(frozen=True)
class PendingAudit:
    """A request of which `peer` served `legs`.  `transcript` is the JSON of a
    `receipts.transcript`, which takes less memory than its tokens do.  `sealed_to` is the public
    half of the request's key, if it has one: what has to be kept of it is sealed to that.  It waits
    `since` that moment (monotonic seconds)."""

    peer: str
    request_id: str
    transcript: bytes
    legs: tuple[LegToAudit, ...]
    sealed_to: bytes | None = None
    attempts: int = 0
    since: float = 0.0

    @property
    def size(self) -> int:
        return len(self.transcript) + sum(len(leg.signed.signed) for leg in self.legs)


class PendingAudits:
    """First come, first audited.  What does not fit is not taken: a peer that sends much cannot
    push out what was chosen before."""

    def __init__(self) -> None:
        self._waiting: deque[PendingAudit] = deque()
        self._of_peer: Counter[str] = Counter()
        self._bytes_of_peer: Counter[str] = Counter()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, audit: PendingAudit) -> bool:
        """Whether there is room for it."""
        if len(self) >= MAX_AUDITS or self._of_peer[audit.peer] >= MAX_OF_PEER:
            return False
        if self._bytes_of_peer[audit.peer] + audit.size > MAX_BYTES_OF_PEER:
            return False
        if self.bytes + audit.size > MAX_BYTES:
            return False
        self._waiting.append(audit)
        self._of_peer[audit.peer] += 1
        self._bytes_of_peer[audit.peer] += audit.size
        self.bytes += audit.size
        return True

    @property
    def waits_since(self) -> float:
        """The `since` of the next one.  Raises IndexError."""
        return self._waiting[0].since

    def take(self) -> PendingAudit:
        """The next one.  Raises IndexError."""
        audit = self._waiting.popleft()
        self.bytes -= audit.size
        self._of_peer[audit.peer] -= 1
        self._bytes_of_peer[audit.peer] -= audit.size
        if not self._of_peer[audit.peer]:
            del self._of_peer[audit.peer], self._bytes_of_peer[audit.peer]
        return audit

    def again(self, audit: PendingAudit) -> bool:
        """Whether one that was interrupted is tried again."""
        tried = audit.attempts + 1
        return tried < MAX_ATTEMPTS and self.add(replace(audit, attempts=tried))
