"""The ASGI application: the endpoints, and the middleware around them."""

from __future__ import annotations

import sqlite3
import time
from functools import cache, partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import Scope

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, StoreError
from pinaivu_box.server.access_log import AccessLog
from pinaivu_box.server.auth import Authenticate
from pinaivu_box.server.background import Background
from pinaivu_box.server.bodies import Bodies
from pinaivu_box.server.cors import Cors
from pinaivu_box.server.endpoints import ENDPOINTS, access_to
from pinaivu_box.server.idle_work import IdleWork
from pinaivu_box.server.openapi import specification
from pinaivu_box.server.pages import errors
from pinaivu_box.server.pages.kept_overviews import KeptOverviews
from pinaivu_box.server.proxies import TrustProxies
from pinaivu_box.server.running_answers import RunningAnswers
from pinaivu_box.server.unread_body import UnreadBody
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.tracing.span import Kind, Span


def create_app(box: Box) -> Starlette:
    app = Starlette(
        routes=ENDPOINTS,
        middleware=[
            Middleware(TrustProxies, trusted=lambda: box.config.server.trusted_proxies),
            Middleware(UnreadBody),
            Middleware(Cors, origins=box.config.server.cors_origins),
            Middleware(AccessLog, answered=partial(_note_answer, box)),
            Middleware(Authenticate, box=box, access_to=access_to, refused=errors.on_refusal),
        ],
        exception_handlers={
            ApiError: errors.on_error,
            StoreError: errors.on_error,
            HTTPException: errors.on_http_error,
            sqlite3.OperationalError: errors.on_database_error,
        },
    )
    app.state.box = box
    app.state.bodies = Bodies()
    app.state.background = Background()
    app.state.answers = RunningAnswers()
    app.state.importing = set()  # accounts
    app.state.idle_work = IdleWork(box)
    app.state.overviews = KeptOverviews()
    app.state.openapi = cache(partial(specification, ENDPOINTS))
    app.router.redirect_slashes = False  # AccessLog has normalised the path
    return app


def _note_answer(box: Box, scope: Scope, status: int) -> None:
    state = scope["state"]
    # Who stops a box has it refuse what comes; that is no incident.
    if "runs_model" in state and not box.admission.draining:
        box.incidents.answered(status)
    if (trace := state.get("trace")) is not None:
        box.tracer.add(_span(scope, trace, status))


def _span(scope: Scope, trace: TraceContext, status: int) -> Span:
    """Of an HTTP request that runs a model, at one of our routes."""
    state, route = scope["state"], scope["path"]
    for name, value in scope.get("path_params", {}).items():
        route = route.replace(str(value), f"{{{name}}}")
    attributes = {
        "http.request.method": scope["method"],
        "http.route": route,
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "http.response.status_code": status,
        "pinaivu.request_id": state["request_id"],
        "pinaivu.error_code": state.get("error_code"),
    }
    failed = state.get("error_code", str(status)) if status >= 500 else ""
    title = f"{scope['method']} {route}"
    return Span(trace, title, Kind.SERVER, trace.began, time.time(), attributes, failed)
