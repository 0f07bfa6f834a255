"""What handlers share: the box, who asks, and the error for a value that is not valid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from pinaivu_box.box import Box
from pinaivu_box.errors import InvalidBody
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.sessions import address_of, session_of
from pinaivu_box.store.audit import Actor


def box_of(request: Request) -> Box:
    box: Box = request.app.state.box
    return box


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["state"]["request_id"]
    return request_id


def actor_of(request: Request) -> Actor:
    """The key, or the account of a session, and the address, as the audit trail records them."""
    session = session_of(request)
    name = key_of(request).id if session is None else session.account.id
    return Actor(name, address_of(request))


@contextmanager
def named_field(*loc: str | int) -> Iterator[None]:
    """Turn a ValueError into an InvalidBody that names this field of the request."""
    try:
        yield
    except ValueError as error:
        raise InvalidBody(str(error), loc=loc) from None
