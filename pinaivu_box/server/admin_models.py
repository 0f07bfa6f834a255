"""`/v1/admin/models`: the models and their files, and what operators do with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box.amount import Prices
from pinaivu_box.box import Box, NotServed, not_served_in
from pinaivu_box.config import GpuLayers
from pinaivu_box.engine.messages import KvType, MinP, Temperature, TopK, TopP
from pinaivu_box.errors import Conflict, PullFailed
from pinaivu_box.gateway.fit_report import fit_of
from pinaivu_box.model_admin import aliases, loading, overrides, remove
from pinaivu_box.model_admin import pull as pulling
from pinaivu_box.model_admin.progress import PullProgress
from pinaivu_box.model_admin.pull import Pull
from pinaivu_box.model_admin.remove import RemovedModel
from pinaivu_box.models import description, known_models, licenses, memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.description import ModelDescription, settings_of
from pinaivu_box.models.names import printable
from pinaivu_box.models.overrides import Context, KeepAlive, Parallel
from pinaivu_box.models.prices import prices_of
from pinaivu_box.registry import hub_search
from pinaivu_box.registry.hub_search import FoundModel
from pinaivu_box.registry.reference import host_of
from pinaivu_box.server.admin_peers import network_of
from pinaivu_box.server.context import actor_of, box_of, named_field, request_id_of
from pinaivu_box.server.inference import keep_alive_seconds
from pinaivu_box.server.json_response import JsonLines
from pinaivu_box.server.paging import ListAnswer

Name = Annotated[str, Meta(min_length=1, max_length=1000)]


class ModelView(Struct, frozen=True):
    """`size` in bytes, `context` in tokens.  `files` are all files of a model in several parts.
    `price` is that of 1,000 tokens, and `state` is loaded, loading, failing (`why` says how) or
    idle."""

    id: str
    size: int
    owner: str
    architecture: str
    context: int
    files: list[str]
    parameters: int = 0
    quantisation: str = ""
    license: str = ""
    price: Prices = Prices("0", "0")
    aliases: list[str] = []
    state: Literal["loaded", "loading", "failing", "idle"] = "idle"
    why: str = ""
    pinned: bool = False


class ModelFiles(Struct, frozen=True):
    """`not_served` are the files of the models folder that are not served, and why."""

    request_id: str
    data: list[ModelView]
    not_served: list[NotServed]


async def list_model_files(request: Request) -> ModelFiles:
    box = box_of(request)
    return ModelFiles(
        request_id_of(request),
        list_views(box),
        not_served_in(box.catalog),
    )


def list_views(box: Box) -> list[ModelView]:
    return [_view(model, box) for model in box.catalog.models]


class KnownQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`q`: words that are in the name, the purpose or the licence; without it, all models."""

    q: Annotated[str, Meta(max_length=200)] = ""


class KnownModelView(Struct, frozen=True):
    """A model that is known to work.  `name` is what to pull; `size` and `memory` (with a context
    of 8,192 tokens) in bytes, `parameters` in billions.  `served`: this box has it."""

    name: str
    purpose: str
    parameters: float
    size: int
    memory: int
    license: str
    served: bool


class KnownModelList(ListAnswer, frozen=True):
    """`available` is the memory in bytes that models can have here, null if that is not known."""

    data: list[KnownModelView]
    available: int | None


async def list_known_models(request: Request, query: KnownQuery) -> KnownModelList:
    """The smallest first."""
    served = {model.id for model in box_of(request).catalog.models}
    found = [
        KnownModelView(
            *(model.name, model.purpose, model.parameters, model.size, model.memory, model.license),
            served=model.name in served,
        )
        for model in known_models.search(query.q)
    ]
    return KnownModelList(found, memory.available())


class HubQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`q`: words in the names of repositories; the Hub is told them, and nothing else."""

    q: Annotated[str, Meta(min_length=1, max_length=200)]


class FoundModelView(FoundModel, frozen=True):
    """`served`: this box has one of its quantisations."""

    served: bool = False


class HubModelList(ListAnswer, frozen=True):
    """`hub` is the host that was asked."""

    data: list[FoundModelView]
    hub: str


async def search_hub(request: Request, query: HubQuery) -> HubModelList:
    """The most downloaded first.  Raises Conflict if the Hub gives no answer."""
    box = box_of(request)
    try:
        found = await hub_search.search(query.q, box.config.registry)
    except PullFailed as error:
        raise Conflict(error.message) from error
    served = {model.id.rpartition(":")[0] for model in box.catalog.models}
    views = [
        FoundModelView(**msgspec.structs.asdict(model), served=model.name in served)
        for model in found
    ]
    return HubModelList(views, host_of(box.config.registry.hub))


def _view(model: Model, box: Box) -> ModelView:
    placement, failure = box.placement, box.placement.failing(model)
    state: Literal["loaded", "loading", "failing", "idle"] = "failing" if failure else "idle"
    if placement.replicas(model.id):
        state = "loaded"
    elif model.id in placement.starting:
        state = "loading"
    return ModelView(
        id=model.id,
        size=model.size,
        owner=model.owner,
        architecture=model.header.architecture,
        context=memory.context_of(model, box.config.engine.context),
        files=[printable(str(file.path)) for file in model.files],
        parameters=model.header.parameters,
        quantisation=model.header.quantisation,
        license=licenses.name_of(model),
        price=prices_of(model, box.config.pricing),
        aliases=box.catalog.aliases.of(model.id),
        state=state,
        why=failure or "",
        pinned=placement.pins(model),
    )


async def pull(request: Request, body: Pull) -> JsonLines[PullProgress]:
    """Raises Conflict, ModelNotFound, PeerNotFound, InvalidBody."""
    box, actor, request_id = box_of(request), actor_of(request), request_id_of(request)
    if body.from_:
        network = network_of(request)
        return JsonLines(await pulling.from_peers(box, network, body, actor, request_id))
    return JsonLines(await pulling.by_name(box, body, actor, request_id))


class NamedModel(Struct, frozen=True):
    """`model` is an id or an alias."""

    model: Name


class ModelToShow(NamedModel, frozen=True):
    """With `fit`, also where the model would go now and what would be left."""

    fit: bool = False


class NewAlias(Struct, frozen=True):
    """`destination` becomes an alias of the model `source`."""

    source: Name
    destination: Name


class AliasMade(Struct, frozen=True):
    """`model` is the id of the model that the alias leads to."""

    alias: str
    model: str
    request_id: str = ""


class LoadRequest(Struct, frozen=True):
    """`keep_alive` is for how long the model stays if nobody uses it, as in Ollama's API."""

    model: Name
    keep_alive: float | str | None = None


class ModelLoaded(Struct, frozen=True):
    """`memory` in bytes, `context` in tokens."""

    model: str
    device: str
    memory: int
    context: int
    request_id: str = ""


class ModelUnloaded(Struct, frozen=True):
    """`unloaded` is false if the model was not loaded.  It stays in memory until the `running`
    requests have ended."""

    model: str
    unloaded: bool
    running: int
    request_id: str = ""


class ModelToPin(NamedModel, frozen=True):
    """A model that is pinned stays loaded once it is: neither idle time nor another model ends it.
    This holds until the box stops; for good, set `pin` (`/v1/admin/models/set`)."""

    pinned: bool = True


class ModelPinned(Struct, frozen=True):
    """`configured` is what will count when the box is started again."""

    model: str
    pinned: bool
    configured: bool
    request_id: str = ""


async def show(request: Request, body: ModelToShow) -> ModelDescription:
    """Raises ModelNotFound."""
    box = box_of(request)
    model = box.admission.find(body.model, aliases.ANYBODY)
    digest = await box.digests.known(model)
    described = description.describe(model, box.config, box.catalog.aliases, digest)
    if not body.fit or model.remote:
        return described
    fit = await fit_of(model, box.placement, box.config.engine, box.prober)
    return msgspec.structs.replace(described, fit=fit)


async def copy(request: Request, body: NewAlias) -> AliasMade:
    """Raises ModelNotFound, InvalidBody, Conflict."""
    made = await aliases.make(box_of(request), body.source, body.destination, actor_of(request))
    return AliasMade(body.destination, made)


async def delete(request: Request, body: NamedModel) -> RemovedModel:
    """Raises ModelNotFound, Conflict."""
    return await remove.remove(box_of(request), body.model, actor_of(request))


async def load(request: Request, body: LoadRequest) -> ModelLoaded:
    """Raises ModelNotFound, Conflict, InvalidBody, NoNodesAvailable."""
    keep_alive = keep_alive_seconds(body.keep_alive)
    engine = await loading.load(box_of(request), body.model, keep_alive, actor_of(request))
    ready = engine.ready
    return ModelLoaded(engine.model_id, ready.device, engine.memory or 0, ready.context)


async def unload(request: Request, body: NamedModel) -> ModelUnloaded:
    """Raises ModelNotFound, Conflict."""
    model, running = await loading.unload(box_of(request), body.model, actor_of(request))
    return ModelUnloaded(model, running is not None, running or 0)


async def pin(request: Request, body: ModelToPin) -> ModelPinned:
    """Raises ModelNotFound, Conflict."""
    model = await loading.pin(box_of(request), body.model, actor_of(request), pinned=body.pinned)
    return ModelPinned(model.id, body.pinned, model.settings.pin)


# -- settings -------------------------------------------------------------------------------------


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
