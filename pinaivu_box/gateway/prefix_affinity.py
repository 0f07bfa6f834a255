"""Which replica of a model has computed the beginning of a request, and whether that is worth
waiting for it: pure, and bounded.

A beginning is known by hashes of its blocks, each of all that is before its end; so a conversation
that goes on is recognised by what it had in the last request.  The hashes cover the cache scope,
since no engine shares prefixes between scopes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import msgspec

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.gateway.backend import Job

BLOCK_BYTES = 512
MAX_BLOCKS = 64
_MAX_ENTRIES = 16384
_BYTES_A_TOKEN = 4
# What a request that is there already costs a newcomer, in prompt tokens that could be computed
# meanwhile: a part of each step, and for a full replica the wait for a place.
_TOKENS_A_USER = 256
_TOKENS_A_PLACE = 4096

Beginning = tuple[bytes, ...]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class ReplicaLoad:
    """`matched` are the bytes of a request's beginning that the replica has computed."""

    users: int
    places: int
    matched: int = 0

    def cost(self, size: int) -> float:
        """Of a request with a beginning of so many bytes, in tokens to be computed before its
        first."""
        full = max(0, self.users - self.places + 1)
        own = (size - self.matched) / _BYTES_A_TOKEN
        return own + self.users * _TOKENS_A_USER + full * _TOKENS_A_PLACE


def choose(replicas: Sequence[ReplicaLoad], beginning: Beginning) -> int:
    """The number of the replica that will give a request's first token soonest."""
    costs = [replica.cost(len(beginning) * BLOCK_BYTES) for replica in replicas]
    return costs.index(min(costs))


def beginning_of(job: Job) -> Beginning:
    """The hashes of the job's first blocks."""
    if not job.cache:
        return ()
    digest = hashlib.blake2b(job.scope.encode(), digest_size=16)
    data = b"".join(_texts(job))[: MAX_BLOCKS * BLOCK_BYTES]
    hashes = []
    for start, end in pairwise(range(0, len(data) + 1, BLOCK_BYTES)):
        digest.update(data[start:end])
        hashes.append(digest.digest())
    return tuple(hashes)


def _texts(job: Job) -> Iterator[bytes]:
    """What the prompt is made of, in its order and no more than is looked at."""
    yield job.tools.functions.encode() if job.tools is not None else b""
    if job.prompt is not None:
        size = MAX_BLOCKS * BLOCK_BYTES
        yield msgspec.json.encode(job.prompt[:size])
        return
    left = MAX_BLOCKS * BLOCK_BYTES
    for message in job.messages:
        yield (text := msgspec.json.encode(message))
        left -= len(text)
        if left <= 0:
            return


class PrefixAffinity(Generic[K]):
    """Remembers which replicas had which beginnings lately.  A replica that has ended is never
    asked about again: what is known of it falls out in time."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._replicas: BoundedDict[bytes, tuple[K, ...]] = BoundedDict(max_entries)

    def note(self, replica: K, beginning: Beginning) -> None:
        """The replica computes a request that begins so."""
        for block in beginning:
            others = tuple(key for key in self._replicas.get(block, ()) if key != replica)
            self._replicas[block] = (*others[-3:], replica)

    def matched(self, replica: K, beginning: Beginning) -> int:
        """How many bytes of the beginning the replica has likely in its cache."""
        blocks = 0
        for block in beginning:
            if replica not in self._replicas.get(block, ()):
                break
            blocks += 1
        return blocks * BLOCK_BYTES
