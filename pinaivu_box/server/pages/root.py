"""What needs no key and describes the box: `/`, `/docs` and `/openapi.json`.

`/` sends a browser to the page that fits, and answers programs with JSON.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pinaivu_box import __version__
from pinaivu_box.server.context import box_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.pages.errors import wants_page
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.paths import forwarded_prefix
from pinaivu_box.server.sessions import session_of, start_page
from pinaivu_box.store import accounts

_ADDRESSES = {"api": "/v1", "docs": "/docs", "openapi": "/openapi.json", "health": "/health"}


async def index(request: Request) -> Response:
    prefix = forwarded_prefix(request.headers)
    if wants_page(request):
        box = box_of(request)
        if (session := session_of(request)) is not None:
            return _to(prefix + start_page(session.account))
        if box.config.login.oidc.issuer or await accounts.have_passwords(box.database):
            return _to(f"{prefix}/login")
        return page(request, "welcome.html")
    addresses = {name: f"{prefix}{path}" for name, path in _ADDRESSES.items()}
    about = {"name": "Pinaivu Box", "version": __version__, **addresses}
    return JSON(about, headers={"vary": "Accept"})


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, {"cache-control": "no-store", "vary": "Accept"})


async def openapi_document(request: Request) -> Response:
    document = request.app.state.openapi()
    if prefix := forwarded_prefix(request.headers):
        document = {**document, "servers": [{"url": prefix}]}
    return JSON(document)


async def docs(request: Request) -> Response:
    return page(request, "docs.html")
