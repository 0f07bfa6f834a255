"""The error of a model that does not fit a device."""

from __future__ import annotations

from pinaivu_box.engine.messages import OutOfMemory
from pinaivu_box.errors import BoxError

_PURPOSES = {
    "weights": "its weights",
    "cache": "the KV cache",
    "compute": "the buffers for computing",
    "": "a buffer",
}


class EngineOutOfMemory(BoxError):
    """`what` could not be done, since `shortage` could not be allocated."""

    def __init__(self, what: str, shortage: OutOfMemory) -> None:
        size = f"{shortage.wanted / 2**20:,.0f} MiB for " if shortage.wanted else ""
        where = f"{shortage.device} has no room for {size}{_PURPOSES[shortage.purpose]}"
        super().__init__(f"{what}: {where}")
        self.shortage = shortage
