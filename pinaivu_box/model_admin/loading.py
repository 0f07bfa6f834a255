"""Loads and unloads models as operators ask."""

from __future__ import annotations

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.model_admin.aliases import ANYBODY
from pinaivu_box.models.catalog import Model
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor

_OPERATORS = "operators"  # the tenant for whom they load


async def load(box: Box, name: str, keep_alive: float | None, actor: Actor) -> EngineProcess:
    """Load a model; it stays for `keep_alive` seconds, or as long as models do here.  Raises
    ModelNotFound, Conflict, NoNodesAvailable."""
    model = model_here(box, name)
    engine = await box.placement.acquire(model)
    box.placement.release(engine, _OPERATORS, keep_alive)
    await box.database.write(audit.note(actor, "model.load", model.id))
    return engine


async def unload(box: Box, name: str, actor: Actor) -> tuple[str, int | None]:
    """Unload a model at once, or after the requests that it serves.  Returns its id, and how many
    those are, None if it was not loaded.  Raises ModelNotFound, Conflict."""
    loaded = [model_id for model_id in box.placement.loaded if model_id == name]
    model_id = loaded[0] if loaded else model_here(box, name).id
    running = await box.placement.unload(model_id)
    if running is not None:
        await box.database.write(audit.note(actor, "model.unload", model_id, running=running))
    return model_id, running


async def pin(box: Box, name: str, actor: Actor, *, pinned: bool) -> Model:
    """Pin a model, or let it be unloaded again, until this box stops.  Raises ModelNotFound,
    Conflict."""
    model = model_here(box, name)
    box.placement.pin(model, pinned=pinned)
    await box.database.write(audit.note(actor, "model.pin", model.id, pinned=pinned))
    return model


def model_here(box: Box, name: str) -> Model:
    """Return a model of this box, or where the alias leads.  Raises ModelNotFound, Conflict."""
    model = box.admission.find(name, ANYBODY)
    if model.remote:
        where = "peers ls" if model.owner == "peers" else "upstreams"
        raise Conflict(f"{model.id} is not on this box, only on others: see 'pinaivu {where}'.")
    return model
