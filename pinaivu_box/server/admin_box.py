"""`/v1/admin/devices`, `upstreams` and `reload`: what models run on, and the configuration."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.box import Box, NotServed
from pinaivu_box.engine.messages import GgmlBackend
from pinaivu_box.errors import CliError, InvalidBody
from pinaivu_box.gateway.device_views import DeviceView, device_views
from pinaivu_box.server.context import box_of, request_id_of
from pinaivu_box.upstream.upstream import Upstream


class DeviceList(Struct, frozen=True):
    """`failure` says why they could not be listed, as the end of a sentence.  `backends` are the
    libraries for other devices than the CPU."""

    request_id: str
    data: list[DeviceView]
    backends: list[GgmlBackend]
    failure: str = ""
    object: str = "list"


async def list_devices(request: Request) -> DeviceList:
    box = box_of(request)
    views = device_views(await box.devices.read(), box.placement.engines)
    return DeviceList(request_id_of(request), views, box.devices.backends, box.devices.failure)


class UpstreamView(Struct, frozen=True):
    """`state` is ready, busy, failing (the circuit breaker leaves it alone) or down, and `why` says
    more unless it is ready.  `models` are the names here with the names there; `ttft_ms` and
    `tokens_per_s` are medians of lately, null before the first request."""

    name: str
    url: str
    state: str
    why: str | None
    models: dict[str, str]
    running: int
    waiting: int
    concurrency: int
    ttft_ms: int | None
    tokens_per_s: int | None


class UpstreamList(Struct, frozen=True):
    request_id: str
    data: list[UpstreamView]
    object: str = "list"


async def list_upstreams(request: Request) -> UpstreamList:
    box = box_of(request)
    return UpstreamList(request_id_of(request), [_view(box, each) for each in box.upstreams.all])


def _view(box: Box, upstream: Upstream) -> UpstreamView:
    state, why = _state(upstream, box.boxes.breaker.why(upstream.id))
    speed = upstream.tokens_per_s if upstream.measured else None
    return UpstreamView(
        name=upstream.name,
        url=upstream.config.url,
        state=state,
        why=why,
        models=upstream.models,
        running=upstream.places.running,
        waiting=upstream.places.waiting,
        concurrency=upstream.places.limit,
        ttft_ms=round(upstream.ttft_ms) if upstream.measured else None,
        tokens_per_s=None if speed is None else round(speed),
    )


def _state(upstream: Upstream, tripped: str | None) -> tuple[str, str | None]:
    if upstream.down is not None:
        return "down", f"it {upstream.down}"
    if tripped is not None:
        return "failing", f"it {tripped}"
    if seconds := upstream.busy_seconds:
        return "busy", f"it has asked to be left alone for {seconds:.0f} s"
    return "ready", None


class ReloadAnswer(Struct, frozen=True):
    """See `box.Reloaded`."""

    request_id: str
    applied: list[str]
    engines: list[str]
    restart: list[str]
    models: list[str]
    not_served: list[NotServed]


async def reload(request: Request) -> ReloadAnswer:
    """Raises InvalidBody if the configuration is invalid."""
    try:
        return ReloadAnswer(request_id_of(request), *await box_of(request).reload())
    except CliError as error:
        raise InvalidBody(error.message, loc=("configuration",)) from error
