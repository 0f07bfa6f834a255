"""`/admin/models`: the models of this box, and those that can be pulled."""

from __future__ import annotations

from typing import get_args

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.engine.messages import KvType
from pinaivu_box.models import catalog
from pinaivu_box.registry.reference import host_of
from pinaivu_box.server import admin_models
from pinaivu_box.server.admin_models import KnownQuery, ModelToShow
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sessions import require_admin

_MAX_QUERY = 200


class ModelsQuery(Struct, frozen=True):
    """`q`: words to look for among the known models."""

    q: str = ""


class ModelQuery(Struct, frozen=True):
    model: str = ""


async def models(request: Request, query: ModelsQuery) -> HTMLResponse:
    require_admin(request)
    box, words = box_of(request), query.q[:_MAX_QUERY]
    files = await admin_models.list_model_files(request)
    known = await admin_models.list_known_models(request, KnownQuery(words))
    return page(
        request,
        "admin/models.html",
        models=files.data,
        not_served=files.not_served,
        known=known.data,
        available=known.available,
        words=words,
        folder=str(catalog.directory(box.config, box.home)),
        peering=box.network is not None,
        hub=host_of(box.config.registry.hub),
    )


async def model(request: Request, query: ModelQuery) -> HTMLResponse:
    """Raises ModelNotFound."""
    require_admin(request)
    box = box_of(request)
    shown = await admin_models.show(request, ModelToShow(query.model))
    state = next((each for each in admin_models.list_views(box) if each.id == shown.model), None)
    return page(
        request,
        "admin/model.html",
        model=shown,
        state=state,
        kv_types=get_args(KvType),
    )
