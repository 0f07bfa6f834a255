"""What the operations under `/v1/admin` share: who asks, body, query and answer."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.openai.request import SMALL, decode, from_validation
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.bodies import read
from pinaivu_box.server.envelope import JSON
from pinaivu_box.store.audit import Actor

Kind = TypeVar("Kind", bound=Struct)


class Page(Struct, frozen=True, forbid_unknown_fields=True):
    """`after`: the last of the page before."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: str | None = None


def box_of(request: Request) -> Box:
    box: Box = request.app.state.box
    return box


def by(request: Request) -> Actor:
    """For the audit trail."""
    return Actor(key_of(request).id, request.client.host if request.client else "")


async def body(request: Request, kind: type[Kind], *, empty: bytes = b"") -> Kind:
    """The decoded body, `empty` where there is none.  Raises what `bodies.read` and `decode` do."""
    data = await read(request, min(SMALL, box_of(request).config.server.max_body_bytes))
    return decode(data or empty, kind, strict=True)[0]


def query(request: Request, kind: type[Kind]) -> Kind:
    """The parameters behind the `?`.  Raises InvalidBody."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise from_validation(error, root="query") from error


def answer(request: Request, made: Any) -> Response:
    """A struct that has a `request_id`."""
    request_id = request.scope["state"]["request_id"]
    return JSON(msgspec.structs.replace(made, request_id=request_id))
