"""Paths as clients write them: their one form, the prefix of a proxy, and what is near an unknown
one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import Request

from pinaivu_box.text import END

if TYPE_CHECKING:
    from pinaivu_box.server.endpoint import Endpoint

_ABSOLUTE = re.compile(r"^https?://[^/?#]*", re.IGNORECASE)  # RFC 9112, section 3.2.2
_REPEATED_VERSION = re.compile(rf"^(?:/v1)+(?=/v1(?:/|{END}))")
_PREFIX = re.compile(rf"(?:/[A-Za-z0-9._~-]+)+{END}")
PREFIX_HEADER = "x-forwarded-prefix"
_MAX_PREFIX_CHARACTERS = 200
_PARAMETER = re.compile(r"{[^}]*}")
_FOREIGN_BASE = re.compile(rf"^(?:/(?:api|openai|v[0-9]+))*(?=/|{END})")  # of other servers' URLs
_API = ("/v1/", "/api/")  # all else are pages, and answers to GET
_MIN_SIMILARITY = 0.7
_MAX_PATHS_NAMED = 8
_MAX_COMPARED_CHARACTERS = 100


def normalise(path: str) -> str:
    """`/v1/v1/models/` and `//v1/models` are `/v1/models`: base URLs are pasted in every way."""
    path = re.sub(r"/{2,}", "/", _ABSOLUTE.sub("", path))
    return _REPEATED_VERSION.sub("", path).rstrip("/") or "/"


def forwarded_prefix(headers: Headers) -> str:
    """The path under which a reverse proxy shows this box, and which it removes; "" for none.

    From `X-Forwarded-Prefix`, to which each proxy of a chain adds its own after a comma.
    """
    parts = headers.get(PREFIX_HEADER, "").split(",")
    prefix = "".join(part.strip().rstrip("/") for part in parts)
    # It becomes part of addresses: one that began with two slashes would name another host.
    valid = len(prefix) <= _MAX_PREFIX_CHARACTERS and _PREFIX.match(prefix)
    return prefix if valid else ""


def server_address(request: Request) -> str:
    """Where clients reach this box, as this one did: `http://box:4001`."""
    return f"{request.url.scheme}://{request.url.netloc}{forwarded_prefix(request.headers)}"


def methods_at(path: str, endpoints: Iterable[Endpoint]) -> list[str]:
    """The methods that the path takes."""
    return sorted({each.method for each in endpoints if each.has_path(path)})


def suggestion(method: str, path: str, endpoints: Sequence[Endpoint]) -> str:
    """A sentence that names the paths most like an unknown one, or else some that exist.

    Of those that are as near, the API's come first, and of these those that answer the method: a
    client that mistyped a path may have the wrong method too.  Pages are named to nobody but
    browsers that open an address.
    """
    path = path[:_MAX_COMPARED_CHARACTERS]  # compared on the event loop, also without a key
    opens = method in ("GET", "HEAD") and not path.startswith("/v1")
    endpoints = [each for each in endpoints if opens or each.path.startswith(_API)]
    scored = [(_similarity(path, each.path), each) for each in endpoints]
    scored.sort(key=itemgetter(0), reverse=True)
    best = scored[0][0]
    near = [each for score, each in scored if score >= max(_MIN_SIMILARITY, best - 0.1)]
    if near:
        nearest = [each for score, each in scored if score == best]
        nearest = [each for each in nearest if each.path.startswith(_API)] or nearest
        nearest = [each for each in nearest if method in (each.methods or ())] or nearest
        named = [*nearest, *(each for each in near if each not in nearest)][:3]
        names = [f"{each.method} {_PARAMETER.sub('{id}', each.path)}" for each in named]
        return f"Did you mean {' or '.join(names)}?"
    plain = list(dict.fromkeys(each.path for each in endpoints if "{" not in each.path))
    return f"There are {', '.join(plain[:_MAX_PATHS_NAMED])} and more; /docs describes all of them."


def _similarity(path: str, template: str) -> float:
    """From 0 to 1; base URLs are pasted with /v1, without it, or with another server's."""
    short = _FOREIGN_BASE.sub("", path)
    of_short = _ratio(short, _FOREIGN_BASE.sub("", template)) if short else 0.0
    return max(_ratio(path, template), of_short)


def _ratio(path: str, template: str) -> float:
    """Without what stands for parameters, which is like anything."""
    parts, segments = template.split("/"), path.split("/")
    literal = [n for n, part in enumerate(parts) if not _PARAMETER.fullmatch(part)]
    compared = [segment for n, segment in enumerate(segments) if n in literal or n >= len(parts)]
    if len(segments) < len(parts):
        compared.append("")  # it lacks one
    expected = "/".join(parts[n] for n in literal)
    return difflib.SequenceMatcher(None, "/".join(compared), expected).ratio()
