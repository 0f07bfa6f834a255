"""Settings of models that are set and reset while a box runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict
from pinaivu_box.model_admin.loading import model_here
from pinaivu_box.models import overrides as override_file
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.overrides import MAX_MODELS, NONE, OF_ENGINES
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor


async def change(
    box: Box, name: str, changes: Mapping[str, Any], actor: Actor, *, reset: bool = False
) -> tuple[Model, list[str]]:
    """Set some settings of a model; null resets one, and `reset` all others.

    Returns the model as it is then, and which of its settings count only once it is loaded again.
    Raises ModelNotFound, Conflict, msgspec.ValidationError, ValueError.
    """
    model = model_here(box, name)
    # What is stored is read again, since others may have changed it before the catalog knows.
    made = override_file.read(box.home)
    before = made.get(model.id, NONE)
    made[model.id] = after = override_file.changed(NONE if reset else before, changes)
    if len(made) > MAX_MODELS:
        raise Conflict(f"{MAX_MODELS} models of this box have settings of their own: reset some.")
    _write(box, made)
    await box.look_for_models()
    model = box.catalog.get(model.id) or model
    if before.pin != after.pin:  # what it is for good counts from now on
        box.placement.pin(model, pinned=model.settings.pin)
    box.placement.reloaded()
    await box.database.write(
        audit.note(actor, "model.set", model.id, before=before.as_json(), after=after.as_json())
    )
    loaded = box.placement.replicas(model.id)
    later = [name for name in OF_ENGINES if getattr(before, name) != getattr(after, name)]
    return model, later if loaded else []


def forget(box: Box, model: Model) -> None:
    """Reset the settings of a model that is deleted.  Raises Conflict."""
    if model.overrides != NONE:
        made = override_file.read(box.home)
        made.pop(model.id, None)
        _write(box, made)


def _write(box: Box, made: dict[str, override_file.ModelOverrides]) -> None:
    """Raises Conflict."""
    try:
        override_file.write(made, box.home)
    except OSError as error:
        raise Conflict(f"The settings cannot be stored: {error.strerror or error}.") from error
