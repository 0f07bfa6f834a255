"""Aliases that are made and removed while a box runs."""

from __future__ import annotations

from contextlib import suppress

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict, InvalidBody, ModelNotFound, quoted
from pinaivu_box.models import aliases as alias_file
from pinaivu_box.models.aliases import Aliases
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.names import RULE, is_model_id
from pinaivu_box.policy import Policy
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor

ANYBODY = Policy()  # who may use all models


async def make(box: Box, source: str, alias: str, actor: Actor) -> str:
    """Make an alias of the model `source`, or of where that alias leads; returns the model's id.
    Raises InvalidBody, ModelNotFound, Conflict."""
    if not is_model_id(alias):
        raise InvalidBody(
            f"'{quoted(alias)}' is not a name of a model ({RULE})", loc=("body", "destination")
        )
    model = box.admission.find(source, ANYBODY)
    known = box.catalog.aliases
    if (existing := known.named(alias)) is not None:
        if known.target_of(existing) == model.id:
            return model.id
        raise Conflict(_taken(existing, known))
    with suppress(ModelNotFound):
        other: Model = box.admission.find(alias, ANYBODY)
        raise Conflict(f"{other.id} is a model: choose another name for the alias.")
    await _change(box, alias, model.id)
    await box.database.write(audit.note(actor, "model.copy", alias, model=model.id))
    return model.id


async def remove(box: Box, alias: str, actor: Actor) -> None:
    """Remove an alias that exists.  Raises Conflict."""
    known = box.catalog.aliases
    if alias in known.configured:
        raise Conflict(
            f"{alias} is an alias of the configuration: remove it there, then run 'pinaivu reload'."
        )
    await _change(box, alias, None)
    noted = audit.note(actor, "model.delete", alias, alias_of=known.made[alias])
    await box.database.write(noted)


def _taken(alias: str, known: Aliases) -> str:
    leads = f"{alias} is an alias of {known.target_of(alias)} already"
    if alias in known.configured:
        return f"{leads}: change it in the configuration."
    return f"{leads}: remove it first ('pinaivu rm {alias}')."


async def _change(box: Box, alias: str, target: str | None) -> None:
    """Store an alias, or without a target remove it.  What is stored is read again, since others
    may have changed it before the catalog knows.  Raises Conflict, CliError."""
    made = dict(alias_file.read({}, box.home).made)
    made.pop(alias, None)
    if target is not None:
        made[alias] = target
    if len(made) > alias_file.MAX_ALIASES:
        raise Conflict(f"This box has {alias_file.MAX_ALIASES} aliases, which is the most.")
    try:
        alias_file.write(made, box.home)
    except OSError as error:
        raise Conflict(f"The alias cannot be stored: {error.strerror or error}.") from error
    await box.look_for_models()
