"""CORS: what scripts of web pages may do, also from the internet to a private network."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

_EXPOSED = [
    *("x-request-id", "request-id", "x-pinaivu-route", "x-pinaivu-ignored"),
    *("openai-processing-ms", "Retry-After"),
    *(
        f"x-ratelimit-{field}-{unit}"
        for field in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
]
# What a preflight also asks for when a page from the internet calls a private address.  Browsers
# used the second name for a while; today they ask the user and send no header.
_NETWORKS = ("Private-Network", "Local-Network")
_REQUEST_HEADERS = {name: f"access-control-request-{name.lower()}" for name in _NETWORKS}


class Cors(CORSMiddleware):
    """Starlette's middleware.  A page on the internet may reach a box in a private network if
    `origins` names the origin of the page; "*" does not allow it."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
        self._named_origins = set(origins) - {"*"}

    def preflight_response(self, request_headers: Headers) -> Response:
        networks = [
            name
            for name, header in _REQUEST_HEADERS.items()
            if request_headers.get(header) == "true"
        ]
        # Starlette would refuse the whole preflight, also of a browser that only warns.
        other_headers = [
            (name, value)
            for name, value in request_headers.raw
            if name.decode("latin-1") not in _REQUEST_HEADERS.values()
        ]
        response = super().preflight_response(Headers(raw=other_headers))
        if networks and request_headers["origin"] in self._named_origins:
            response.headers.add_vary_header("Origin")
            for name in networks:
                response.headers[f"Access-Control-Allow-{name}"] = "true"
        return response
