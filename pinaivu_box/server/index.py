"""`/`: what this is, and what there is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box import __version__
from pinaivu_box.server.edge import prefix_of
from pinaivu_box.server.envelope import JSON

_PLACES = {"api": "/v1", "docs": "/docs", "openapi": "/openapi.json", "health": "/health"}


async def index(request: Request) -> Response:
    prefix = prefix_of(request.headers)
    places = {name: f"{prefix}{path}" for name, path in _PLACES.items()}
    return JSON({"name": "Pinaivu Box", "version": __version__, **places})
