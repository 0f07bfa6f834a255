"""What handlers share: the box, who asks, and the error for a value that is not valid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from pinaivu_box.box import Box
from pinaivu_box.errors import InvalidBody
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


@contextmanager
def named_field(*loc: str | int) -> Iterator[None]:
    """Turn a ValueError into an InvalidBody that names this field of the request."""
    try:
        yield
    except ValueError as error:
        raise InvalidBody(str(error), loc=loc) from None
