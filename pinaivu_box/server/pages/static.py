"""`/static/...`: the style sheet and the scripts of the pages, compressed for who takes that.

Pages are not: the length of a compressed page would tell what is in it to who can put text beside
a secret there (BREACH, Gluck, Harris and Prado, 2013).
"""

from __future__ import annotations

import gzip
import mimetypes
from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.errors import NotFound
from pinaivu_box.server.pages.render import STATIC, version_of

_FOREVER = "public, max-age=31536000, immutable"


@cache
def _names() -> frozenset[str]:
    return frozenset(str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file())


@cache
def _gzipped(name: str, version: str) -> bytes:
    return gzip.compress((STATIC / name).read_bytes(), mtime=0)


def _takes_gzip(accepted: str) -> bool:
    """By `Accept-Encoding` (RFC 9110, section 12.5.3)."""
    weights = {
        coding.strip().lower(): weight.replace(" ", "").rstrip("0.")
        for coding, _, weight in (part.partition(";") for part in accepted.split(","))
    }
    return weights.get("gzip", "q=") != "q="


async def static_file(request: Request, name: str) -> Response:
    """Only what is in the folder when it is first asked for; no path is ever put together.

    Raises NotFound.
    """
    if name not in _names():
        raise NotFound(f"There is no file /static/{name[:100]}.")
    version = version_of(name)
    current = request.query_params.get("v") == version
    headers = {
        "etag": f'W/"{version}"',  # modules import each other without the version
        "vary": "accept-encoding",
        "cache-control": _FOREVER if current else "no-cache",
        "x-content-type-options": "nosniff",
    }
    if f'"{version}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        content = _gzipped(name, version)
    else:
        content = (STATIC / name).read_bytes()
    return Response(content, headers=headers, media_type=kind)
