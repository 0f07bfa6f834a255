"""`/v1/explorer`: who served a request and how that is proven, and how the network is.

With `[explorer] access = "login"` a key or session sees the receipts of its account, and an admin's
those of all; with "public" everybody who knows a request_id sees what is not anybody's secret.
Whoever may see a receipt may not see its openings, nor the names of keys: the explorer has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from pinaivu_box.box import Box
from pinaivu_box.errors import Forbidden, ReceiptNotFound, SessionEnded
from pinaivu_box.server.context import box_of
from pinaivu_box.server.explorer_network import ExplorerNetwork, explorer_network
from pinaivu_box.server.explorer_receipt import ExplorerReceipt, explorer_receipt
from pinaivu_box.store import requests
from pinaivu_box.store.keys import Key


@dataclass(frozen=True)
class Visitor:
    """Who looks: with a key, or one of the public (None)."""

    key: Key | None

    @property
    def account_id(self) -> str | None:
        """Whose receipts it sees; None: those of all accounts."""
        return None if self.key is None or self.key.admin else self.key.account_id


def visitor_of(request: Request) -> Visitor:
    """Raises SessionEnded where one has to log in, Forbidden."""
    key: Key | None = request.scope["state"].get("key")
    if key is not None and ("receipts" in key.policy.scopes or key.admin):
        return Visitor(key)
    if box_of(request).config.explorer.access == "public":
        return Visitor(None)
    if key is None:
        raise SessionEnded("The explorer needs a login on this box: log in on the page /login.")
    raise Forbidden("The explorer needs a key with the scope 'receipts'.")


async def get_receipt(request: Request, request_id: str) -> ExplorerReceipt:
    return await receipt_for(box_of(request), visitor_of(request), request_id)


async def get_network(request: Request) -> ExplorerNetwork:
    return await network_for(box_of(request), visitor_of(request))


async def receipt_for(box: Box, visitor: Visitor, request_id: str) -> ExplorerReceipt:
    """Raises ReceiptNotFound."""
    stored = await requests.find_receipt(box.database, request_id, account_id=visitor.account_id)
    if stored is not None:
        names, public = names_for(box, visitor), visitor.key is None
        inclusion = await box.receipt_log.inclusion(request_id)
        return explorer_receipt(stored, names, public=public, inclusion=inclusion)
    if visitor.key is not None and box.config.explorer.access == "public":
        return await receipt_for(box, Visitor(None), request_id)
    raise ReceiptNotFound(
        f"There is no receipt of {request_id[:100]} that you may see: check the request_id, and "
        "log in to the account that made the request."
    )


async def network_for(box: Box, visitor: Visitor) -> ExplorerNetwork:
    key = visitor.key
    limited = key is not None and box.config.explorer.access != "public"

    def serves(model_id: str) -> bool:
        return not limited or key is None or key.policy.serves(model_id)

    return await explorer_network(box, names_for(box, visitor), serves)


def names_for(box: Box, visitor: Visitor) -> Mapping[str, str]:
    """Names of boxes by node id: those of peers, which operators gave, are not for the public."""
    names = {box.identity.node_id: box.config.peering.name}
    if box.network is not None:
        names[box.identity.node_id] = box.network.name
        if visitor.key is not None:
            names |= {peer.node_id: peer.name for peer in box.network.peers()}
    return names
