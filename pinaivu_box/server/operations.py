"""`POST /v1/admin/reload`: what `pinaivu reload` asks for."""

from __future__ import annotations

from itertools import starmap

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import CliError, InvalidBody
from pinaivu_box.server.envelope import JSON


class NotServed(Struct, frozen=True):
    """`reason` is the end of a sentence."""

    path: str
    reason: str


class ReloadAnswer(Struct, frozen=True):
    """See `box.Reloaded`."""

    request_id: str
    applied: list[str]
    engines: list[str]
    restart: list[str]
    models: list[str]
    not_served: list[NotServed]


async def reload(request: Request) -> Response:
    box: Box = request.app.state.box
    try:
        done = await box.reload()
    except CliError as error:
        raise InvalidBody(error.message, loc=("configuration",)) from error
    request_id = request.scope["state"]["request_id"]
    not_served = list(starmap(NotServed, done.not_served.items()))
    return JSON(
        ReloadAnswer(request_id, done.applied, done.engines, done.restart, done.models, not_served)
    )
