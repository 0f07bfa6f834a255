"""`POST /v1/admin/reload`."""

from __future__ import annotations

from itertools import starmap

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.errors import CliError, InvalidBody
from pinaivu_box.server.context import box_of, request_id_of


class NotServed(Struct, frozen=True):
    """A file that is not served; `reason` is the end of a sentence."""

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


async def reload(request: Request) -> ReloadAnswer:
    """Raises InvalidBody if the configuration is invalid."""
    try:
        reloaded = await box_of(request).reload()
    except CliError as error:
        raise InvalidBody(error.message, loc=("configuration",)) from error
    return ReloadAnswer(
        request_id_of(request),
        reloaded.applied,
        reloaded.engines,
        reloaded.restart,
        reloaded.models,
        list(starmap(NotServed, reloaded.not_served.items())),
    )
