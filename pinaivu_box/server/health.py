"""`/health` (the process runs), `/readyz` (a model can be served) and `/metrics` (Prometheus)."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.server.context import box_of
from pinaivu_box.server.json_response import JSON

_WRITE_CHECK_SECONDS = 5.0  # how long a successful write shows that the next will succeed


async def health(_request: Request) -> Response:
    return JSON({"status": "ok"})


async def readyz(request: Request) -> Response:
    box = box_of(request)
    reason = not_ready(box)
    if reason is None and (why := await box.database.why_not_writable(_WRITE_CHECK_SECONDS)):
        reason = f"nothing can be written to the database: {why}"
    if reason is None:
        return JSON({"status": "ready"})
    return JSON({"status": "not ready", "reason": reason}, 503, headers={"Retry-After": "5"})


def not_ready(box: Box) -> str | None:
    """Why no model can be served; None if one can."""
    if box.admission.draining:
        return "shutting down"
    if any(upstream.down is None and upstream.models for upstream in box.upstreams.all):
        return None
    if not box.catalog.models:
        return "no model is installed"
    failures = [box.placement.failing(model) for model in box.catalog.models]
    return failures[0] if all(failures) else None


async def metrics(request: Request) -> Response:
    box = box_of(request)
    if box.devices.listed:  # else nothing uses one yet
        await box.devices.read()
    # Prometheus's text format, or OpenMetrics for who asks for it.
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(box.metrics.registry), headers={"Content-Type": content_type})
