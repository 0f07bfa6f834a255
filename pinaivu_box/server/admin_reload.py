"""`POST /v1/admin/reload`."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.box import NotServed
from pinaivu_box.errors import CliError, InvalidBody
from pinaivu_box.server.context import box_of, request_id_of


class ReloadAnswer(Struct, frozen=True):
    """See `box.Reloaded`."""

    request_id: str
    applied: list[str]
    engines: list[str]
    restart: list[str]
    models: list[str]
    not_served: list[NotServed]


async def reload(request: Request) -> ReloadAnswer:
    """Raises InvalidBody if the configuration is invalid."""
    try:
        return ReloadAnswer(request_id_of(request), *await box_of(request).reload())
    except CliError as error:
        raise InvalidBody(error.message, loc=("configuration",)) from error
