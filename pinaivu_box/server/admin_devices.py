"""`GET /v1/admin/devices`."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.engine.messages import GgmlBackend
from pinaivu_box.gateway.device_views import DeviceView, device_views
from pinaivu_box.server.context import box_of, request_id_of


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
