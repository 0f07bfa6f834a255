"""The ASGI application: the endpoints, and the middleware around them."""

from __future__ import annotations

import sqlite3
from functools import cache, partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, StoreError
from pinaivu_box.server import error_responses
from pinaivu_box.server.access_log import AccessLog
from pinaivu_box.server.auth import Authenticate
from pinaivu_box.server.background import Background
from pinaivu_box.server.bodies import Bodies
from pinaivu_box.server.cors import Cors
from pinaivu_box.server.endpoints import ENDPOINTS, access_to
from pinaivu_box.server.openapi import specification
from pinaivu_box.server.unread_body import UnreadBody


def create_app(box: Box) -> Starlette:
    app = Starlette(
        routes=ENDPOINTS,
        middleware=[
            Middleware(UnreadBody),
            Middleware(Cors, origins=box.config.server.cors_origins),
            Middleware(AccessLog),
            Middleware(Authenticate, box=box, access_to=access_to),
        ],
        exception_handlers={
            ApiError: error_responses.on_error,
            StoreError: error_responses.on_error,
            HTTPException: error_responses.on_http_error,
            sqlite3.OperationalError: error_responses.on_database_error,
        },
    )
    app.state.box = box
    app.state.bodies = Bodies()
    app.state.background = Background()
    app.state.openapi = cache(partial(specification, ENDPOINTS))
    app.router.redirect_slashes = False  # AccessLog has normalised the path
    return app
