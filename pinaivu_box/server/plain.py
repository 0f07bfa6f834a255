"""Answers that are not JSON: texts, and bytes."""

from __future__ import annotations

from starlette.responses import Response


class PlainText(Response):
    media_type = "text/plain"  # in UTF-8, which Starlette adds


class Octets(Response):
    media_type = "application/octet-stream"
