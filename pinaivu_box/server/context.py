"""What a handler needs of a request beside its parameters: the box, and who asks."""

from __future__ import annotations

from starlette.requests import Request

from pinaivu_box.box import Box
from pinaivu_box.server.auth import key_of
from pinaivu_box.store.audit import Actor


def box_of(request: Request) -> Box:
    box: Box = request.app.state.box
    return box


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["state"]["request_id"]
    return request_id


def actor_of(request: Request) -> Actor:
    """The key and the address, as the audit trail records them."""
    return Actor(key_of(request).id, request.client.host if request.client else "")
