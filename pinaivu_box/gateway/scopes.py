"""Who shares cached prefixes with whom.

A prefix that is found in the cache is answered sooner and costs less, so whoever shares a cache can
find out by guessing what others' prompts say.  Hence an account shares with nobody but itself.  A
`local-only` key shares with itself alone, so that nothing of it shows elsewhere.  What a peer asks
is apart from all that is asked here, and from what other peers ask.

What accounts share all the same are the operator's `[engine] shared_prefixes`.  That somebody asked
with one of them lately can be seen then, by who knows the whole text: so neither `local-only` keys
nor peers share those.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

from pinaivu_box.store.keys import Key

_DAY = 86400  # seconds
_TAG_DIGITS = 32


def scope_of(key: Key) -> str:
    """In which a key's prompts are cached."""
    return key.id if key.policy.local_only else key.account_id


def peer_scope(node_id: str, tag: str | None, request_id: str) -> str:
    """The scope in which a peer's prompt is cached: `node_id` is who the link has proved it to be.

    A peer that sends no tag does not say which of its prompts belong together: those of one request
    do.
    """
    return f"{node_id}/{tag or request_id}"


class ScopeTags:
    """What a peer is told of a prompt's scope, so that it can keep scopes apart: a name that says
    nothing.  It is another one for each peer, and each day (UTC)."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._secret = secrets.token_bytes(32)  # nobody else has it, and nothing keeps it

    def of(self, scope: str, peer: str) -> str:
        """Hex digits, as `Task.tag`."""
        day = int(self._now() // _DAY)
        name = f"{day}\n{peer}\n{scope}".encode()
        return hmac.new(self._secret, name, hashlib.sha256).hexdigest()[:_TAG_DIGITS]
