"""What peers are called, and which peer a name means."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pinaivu_box.errors import PeerNotFound, quoted
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.store.database import Database

_MIN_PREFIX_CHARACTERS = 9  # node_ and 4 digits
_SHOWN_CHARACTERS = 17  # of a node id, where it tells peers of the same name apart


async def names(database: Database) -> dict[str, str]:
    """The names of peers by node id: those given here, else those in their certificates."""
    membership = MembershipStore(database)
    await membership.load()
    roster = membership.roster
    certified = {node: roster.member(node).name for node in roster.known()} if roster else {}
    local_names = {node: peer.name for node, peer in membership.known.items() if peer.name}
    return {node: name for node, name in (certified | local_names).items() if name}


def find(text: str, peers: Mapping[str, str]) -> str:
    """The node id of the peer with that name, node id or beginning of a node id; `peers` has their
    names by node id.

    Raises PeerNotFound, also if several have that name.
    """
    matches = [node for node, name in peers.items() if text in (node, name)] or [
        node for node in peers if len(text) >= _MIN_PREFIX_CHARACTERS and node.startswith(text)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = " or ".join(sorted(node[:_SHOWN_CHARACTERS] for node in matches))
        raise PeerNotFound(
            f"{len(matches)} peers are called '{quoted(text)}': say {ids}.", param="peer"
        )
    named = [name for name in peers.values() if name]
    near = difflib.get_close_matches(text[:100], named, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise PeerNotFound(f"There is no peer '{quoted(text)}'.{hint}", param="peer")
