"""`/v1/models`, which needs no running engine, and `/v1/engines`."""

from __future__ import annotations

import time

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.errors import ModelNotAllowed
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.openai.types import ModelInfo, ModelList
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of, request_id_of


class EngineInfo(Struct, frozen=True):
    """`memory` in bytes, `kv_*` in tokens; `idle_seconds` is null while requests run."""

    model: str
    state: str
    pid: int | None = None
    device: str | None = None
    memory: int | None = None
    context: int | None = None
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    kv_tokens: int = 0
    idle_seconds: float | None = None


class EngineList(Struct, frozen=True):
    request_id: str
    data: list[EngineInfo]
    object: str = "list"


class OneModel(ModelInfo, frozen=True):
    request_id: str = ""


async def list_models(request: Request) -> ModelList:
    models = box_of(request).admission.models(key_of(request).policy)
    data = [ModelInfo(model.id, model.created, model.owner) for model in models]
    return ModelList(request_id_of(request), data)


async def get_model(request: Request, model: str) -> OneModel:
    """Raises ModelNotFound, ModelNotAllowed."""
    policy = key_of(request).policy
    known = box_of(request).admission.find(model, policy)
    if not policy.serves(known.id):
        raise ModelNotAllowed(f"This key may not use {known.id}.", param="model")
    return OneModel(known.id, known.created, known.owner)


async def list_engines(request: Request) -> EngineList:
    placement = box_of(request).placement
    views = [_engine(engine) for engine in placement.engines]
    views += [EngineInfo(model, "loading") for model in placement.starting]
    return EngineList(request_id_of(request), views)


def _engine(engine: EngineProcess) -> EngineInfo:
    return EngineInfo(
        model=engine.model_id,
        state="running" if engine.users else "idle",
        pid=engine.pid,
        device=engine.ready.device,
        memory=engine.memory,
        context=engine.ready.context,
        running=engine.load.running,
        waiting=engine.load.waiting,
        kv_used=engine.load.kv_used,
        kv_cached=engine.load.kv_cached,
        kv_tokens=engine.ready.kv_tokens,
        idle_seconds=None if engine.users else round(time.monotonic() - engine.idle_since, 1),
    )
