"""What the scripts of web pages may do (CORS), also from the internet to a private network."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

_EXPOSED = [
    *("x-request-id", "request-id", "x-pinaivu-route", "x-pinaivu-ignored"),
    *("openai-processing-ms", "Retry-After"),
    *(
        f"x-ratelimit-{w}-{of}"
        for w in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]
# What a preflight asks beside the usual when a page from the internet calls a private address.  The
# second name was used for a while; the permission of today asks the user and sends no header.
_NETWORKS = ("Private-Network", "Local-Network")
_ASKS = {name: f"access-control-request-{name.lower()}" for name in _NETWORKS}


class Cors(CORSMiddleware):
    """Starlette's.  A page may reach from the internet into the network of the box if `origins`
    names its origin: "*" does not."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
        self._named = set(origins) - {"*"}

    def preflight_response(self, request_headers: Headers) -> Response:
        asked = [name for name, ask in _ASKS.items() if request_headers.get(ask) == "true"]
        # Starlette would refuse the whole preflight, also of a browser that only warns.
        others = [
            one for one in request_headers.raw if one[0].decode("latin-1") not in _ASKS.values()
        ]
        answer = super().preflight_response(Headers(raw=others))
        if asked and request_headers["origin"] in self._named:
            answer.headers.add_vary_header("Origin")
            for name in asked:
                answer.headers[f"Access-Control-Allow-{name}"] = "true"
        return answer
