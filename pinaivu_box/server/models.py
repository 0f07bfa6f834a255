"""`/v1/models`, which needs no running engine, and `/v1/engines`."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET, Struct
from starlette.requests import Request

from pinaivu_box.box import Box
from pinaivu_box.engine.messages import DeviceMemory
from pinaivu_box.errors import ModelNotAllowed
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.types import Modalities, ModelInfo, ModelList
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of, request_id_of


class EngineInfo(Struct, frozen=True):
    """`kv_*` in tokens, `memory` in bytes: what the process has of the machine's, while `devices`
    says what it takes on each device.  `idle_seconds` is null while requests run.  `why` says why
    the engine is where it is; `replica` tells engines of the same model apart.  `tokens_per_s` is
    what it computed in the last ten seconds, prompts included, and `stream_tokens_per_s` the median
    speed of one answer of its model, null before the first.  `tokens_*` count since it started:
    those computed, those of prompts that it found in its cache or restored from disk, and those
    drafted and accepted.  `exactness` says on which engines the same request gives the same bits
    ("bitwise:..."), and null that nothing is promised; `cpu_variant` is that of the library for the
    CPU."""

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
    replica: int = 0
    parallel: int | None = None
    pinned: bool = False
    load_seconds: float | None = None
    why: str = ""
    devices: list[DeviceMemory] = []
    tokens_per_s: float = 0.0
    stream_tokens_per_s: float | None = None
    tokens_computed: int = 0
    tokens_cached: int = 0
    tokens_restored: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    exactness: str | None = None
    cpu_variant: str | None = None


class EngineList(Struct, frozen=True):
    request_id: str
    data: list[EngineInfo]
    object: str = "list"


class OneModel(ModelInfo, frozen=True):
    request_id: str = ""


async def list_models(request: Request) -> ModelList:
    box, policy = box_of(request), key_of(request).policy
    data = [_info(box, model) for model in box.admission.models(policy)]
    data += [_info(box, model, alias) for alias, model in box.admission.aliases(policy)]
    return ModelList(request_id_of(request), data)


async def get_model(request: Request, model: str) -> OneModel:
    """Raises ModelNotFound, ModelNotAllowed."""
    policy = key_of(request).policy
    box = box_of(request)
    known = box.admission.find(model, policy)
    if not policy.serves(known.id):
        raise ModelNotAllowed(f"This key may not use {known.id}.", param="model")
    alias = box.catalog.aliases.named(model)
    return OneModel(**msgspec.structs.asdict(_info(box, known, alias)))


def _info(box: Box, model: Model, alias: str | None = None) -> ModelInfo:
    """As it is listed, under its alias if there is one."""
    reads = ["text", "image"] if model.projector is not None else ["text"]
    engines = {engine.ready.exactness for engine in box.placement.replicas(model.id)}
    exactness = engines.pop() if len(engines) == 1 else ""
    return ModelInfo(
        alias or model.id,
        model.created,
        model.owner,
        Modalities(reads, ["text"]),
        alias_of=model.id if alias else UNSET,
        exactness=exactness or UNSET,
    )


async def list_engines(request: Request) -> EngineList:
    box = box_of(request)
    placement = box.placement
    views = [_engine(engine, box) for engine in placement.engines]
    views += [EngineInfo(model, "loading") for model in placement.starting]
    return EngineList(request_id_of(request), views)


def _engine(engine: EngineProcess, box: Box) -> EngineInfo:
    load, speed = engine.load, box.load.measured_tokens_per_s(engine.model_id)
    return EngineInfo(
        model=engine.model_id,
        state="running" if engine.users else "idle",
        pid=engine.pid,
        device=engine.ready.device,
        memory=engine.memory,
        context=engine.ready.context,
        running=load.running,
        waiting=load.waiting,
        kv_used=load.kv_used,
        kv_cached=load.kv_cached,
        kv_tokens=engine.ready.kv_tokens,
        idle_seconds=None if engine.users else round(time.monotonic() - engine.idle_since, 1),
        replica=engine.replica,
        parallel=engine.ready.max_sequences,
        pinned=box.placement.is_pinned(engine),
        load_seconds=round(engine.load_seconds, 3),
        why=engine.plan.why,
        devices=engine.ready.memory,
        tokens_per_s=round(engine.throughput.tokens_per_s, 1),
        stream_tokens_per_s=None if speed is None else round(speed, 1),
        tokens_computed=load.tokens_computed,
        tokens_cached=load.tokens_cached,
        tokens_restored=load.tokens_restored,
        tokens_drafted=load.tokens_drafted,
        tokens_accepted=load.tokens_accepted,
        exactness=engine.ready.exactness or None,
        cpu_variant=engine.ready.cpu_variant or None,
    )
