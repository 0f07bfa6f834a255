"""`/v1/admin/models/set`: settings of models that operators set while the box runs."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box.config import GpuLayers
from pinaivu_box.engine.messages import KvType, MinP, Temperature, TopK, TopP
from pinaivu_box.model_admin import overrides
from pinaivu_box.models.description import settings_of
from pinaivu_box.models.overrides import Context, KeepAlive, Parallel
from pinaivu_box.server.admin_models import NamedModel
from pinaivu_box.server.context import actor_of, box_of, named_field


class SamplingChanges(Struct, frozen=True, forbid_unknown_fields=True):
    """Only the fields that are present are changed; null resets one to what is configured."""

    temperature: Temperature | UnsetType | None = UNSET
    top_p: TopP | UnsetType | None = UNSET
    top_k: TopK | UnsetType | None = UNSET
    min_p: MinP | UnsetType | None = UNSET


class SettingChanges(Struct, frozen=True, forbid_unknown_fields=True):
    """Only the fields that are present are changed; null resets one to what is configured.  They
    mean what they mean in `[[model]]`."""

    context: Context | UnsetType | None = UNSET
    parallel: Parallel | UnsetType | None = UNSET
    kv_type: KvType | UnsetType | None = UNSET
    gpu_layers: GpuLayers | UnsetType | None = UNSET
    keep_alive: KeepAlive | UnsetType | None = UNSET
    pin: bool | UnsetType | None = UNSET
    preload: bool | UnsetType | None = UNSET
    sampling: SamplingChanges | UnsetType | None = UNSET


class ModelToSet(NamedModel, frozen=True):
    """With `reset`, all settings that are not in `settings` are as configured again."""

    settings: SettingChanges = SettingChanges()
    reset: bool = False


class ModelSet(Struct, frozen=True):
    """`settings` are those in force, of which an operator set the `overrides`.  The model is loaded
    with other values of those in `reload`: they count once it was unloaded."""

    model: str
    overrides: dict[str, Any]
    settings: dict[str, Any]
    reload: list[str]
    request_id: str = ""


async def set_model(request: Request, body: ModelToSet) -> ModelSet:
    """Raises ModelNotFound, Conflict, InvalidBody."""
    box = box_of(request)
    changes = msgspec.to_builtins(body.settings)
    with named_field("body", "settings", "keep_alive"):
        model, later = await overrides.change(
            box, body.model, changes, actor_of(request), reset=body.reset
        )
    settings = settings_of(model, box.config)
    return ModelSet(model.id, model.overrides.as_json(), settings, later)
