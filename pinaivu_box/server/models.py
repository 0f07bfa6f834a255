"""`/v1/models` (also without a running engine) and `/v1/engines` (what `pinaivu ps` shows)."""

from __future__ import annotations

import time

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import ModelNotAllowed
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.types import ModelInfo, ModelList
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.envelope import JSON


class EngineView(Struct, frozen=True):
    """One engine.  `memory` in bytes, `idle_seconds` null while it works, `kv_*` in tokens."""

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
    data: list[EngineView]
    object: str = "list"


class OneModel(ModelInfo, frozen=True):
    request_id: str = ""


async def models(request: Request) -> Response:
    box: Box = request.app.state.box
    policy = key_of(request).policy
    data = [_info(model) for model in box.models(policy)]
    return JSON(ModelList(request_id=request.scope["state"]["request_id"], data=data))


async def model(request: Request) -> Response:
    box: Box = request.app.state.box
    policy = key_of(request).policy
    found = box.model(request.path_params["model"], policy)
    if not policy.serves(found.id):
        raise ModelNotAllowed(f"This key may not use {found.id}.", param="model")
    return JSON(
        OneModel(
            id=found.id,
            created=found.created,
            owned_by=found.owner,
            request_id=request.scope["state"]["request_id"],
        )
    )


async def engines(request: Request) -> Response:
    box: Box = request.app.state.box
    data = [_engine(engine) for engine in box.placement.engines]
    data += [EngineView(model, "loading") for model in box.placement.starting]
    return JSON(EngineList(request_id=request.scope["state"]["request_id"], data=data))


def _info(model: Model) -> ModelInfo:
    return ModelInfo(id=model.id, created=model.created, owned_by=model.owner)


def _engine(engine: EngineProcess) -> EngineView:
    return EngineView(
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
