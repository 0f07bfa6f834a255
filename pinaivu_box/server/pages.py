"""What needs no key and describes the box: `/`, `/docs` and `/openapi.json`."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from pinaivu_box import __version__
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.paths import forwarded_prefix

_ADDRESSES = {"api": "/v1", "docs": "/docs", "openapi": "/openapi.json", "health": "/health"}


async def index(request: Request) -> Response:
    prefix = forwarded_prefix(request.headers)
    addresses = {name: f"{prefix}{path}" for name, path in _ADDRESSES.items()}
    return JSON({"name": "Pinaivu Box", "version": __version__, **addresses})


async def openapi_document(request: Request) -> Response:
    document = request.app.state.openapi()
    if prefix := forwarded_prefix(request.headers):
        document = {**document, "servers": [{"url": prefix}]}
    return JSON(document)


async def docs(request: Request) -> Response:
    page = resources.files("pinaivu_box.server").joinpath("docs.html").read_text()
    if request.scope["raw_path"].endswith(b"/"):  # the page names the document relative to itself
        page = page.replace('"openapi.json"', '"../openapi.json"')
    return HTMLResponse(page)
