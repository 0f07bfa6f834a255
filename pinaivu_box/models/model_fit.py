"""Where a model would go if it were loaded now, and what would be left."""

from __future__ import annotations

from msgspec import Struct


class DeviceFit(Struct, frozen=True):
    """What the model would take on a device, in bytes: `layers` of it (the output counts as one),
    and `other` for the process itself, a projector, adapters or a draft model.  `free` can be had
    there for models now, `left` would be after that."""

    device: str
    layers: int
    weights: int
    cache: int
    compute: int
    other: int
    total: int
    free: int
    left: int


class ModelFit(Struct, frozen=True):
    """`fits` says whether it could be loaded now, and `why` why it would go there, or why it could
    not.  The models in `instead_of` would be unloaded.  `context`, `kv_tokens` and `parallel` are
    those that the engine would have."""

    fits: bool
    why: str
    context: int = 0
    kv_tokens: int = 0
    parallel: int = 0
    instead_of: list[str] = []
    devices: list[DeviceFit] = []
