"""Removes models, or other names of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict
from pinaivu_box.files import store as file_store
from pinaivu_box.model_admin import aliases, overrides
from pinaivu_box.model_admin.aliases import ANYBODY
from pinaivu_box.models import catalog
from pinaivu_box.models import record as records
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.names import printable
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor


class RemovedModel(Struct, frozen=True):
    """`files` are gone; `links` of them led to files that stay.  `running` requests still have the
    model and finish.  `aliases` led to it and lead nowhere now.  What was an alias itself is only
    that: `alias_of` names its model, which stays."""

    model: str
    files: list[str] = []
    links: int = 0
    size: int = 0
    running: int = 0
    aliases: list[str] = []
    alias_of: str = ""
    request_id: str = ""


async def remove(box: Box, name: str, actor: Actor) -> RemovedModel:
    """Delete the files of a model and unload it, or remove an alias.  Requests that run finish; new
    ones are refused.  Raises ModelNotFound, Conflict."""
    if (alias := box.catalog.aliases.named(name)) is not None:
        target = box.catalog.aliases.target_of(alias) or ""
        await aliases.remove(box, alias, actor)
        return RemovedModel(alias, alias_of=target)
    model = box.admission.find(name, ANYBODY)
    paths = _removable(model, box)
    links = sum(path.is_symlink() for path in paths)
    await asyncio.to_thread(_delete, paths, catalog.directory(box.config, box.home))
    overrides.forget(box, model)
    await box.look_for_models(removed=[model.id])
    running = await box.placement.unload(model.id) or 0
    files = [printable(str(path)) for path in paths]
    await box.database.write(
        *map(file_store.forgotten, paths), audit.note(actor, "model.delete", model.id, files=files)
    )
    left = box.catalog.aliases.of(model.id)
    return RemovedModel(model.id, files, links, 0 if links else model.size, running, left)


def _removable(model: Model, box: Box) -> list[Path]:
    """The files of a model that may be deleted.  Raises Conflict."""
    if model.remote:
        raise Conflict(
            f"{model.id} is not on this box, only elsewhere: there is nothing to remove."
        )
    if model.owner == "bundled":
        raise Conflict(f"{model.id} is part of this program and cannot be removed.")
    if model.in_cache:
        raise Conflict(f"{model.id} is a model of {model.owner}, which is the one to delete it.")
    configured = {entry.name for entry in box.config.model if entry.path}
    if model.id in configured or model.is_fake:
        raise Conflict(
            f"The configuration names the file of {model.id}: remove its [[model]] entry and run "
            "'pinaivu reload'; its file is yours to delete."
        )
    folder = catalog.directory(box.config, box.home)
    paths = [file.path for file in model.files]
    if model.record is not None and model.record.projector:  # it came with the model
        paths.append(paths[0].with_name(model.record.projector))
    for path in paths:
        if not _is_inside(path, folder):
            raise Conflict(
                f"{printable(str(path))} is not in the models folder itself: the program that put "
                "it there is the one to delete it."
            )
    return paths


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to a place in the folder without a link to another one; the file itself
    may be a link."""
    parent = Path(os.path.realpath(path.parent))
    return path.is_relative_to(folder) and parent.is_relative_to(os.path.realpath(folder))


def _delete(paths: Sequence[Path], folder: Path) -> None:
    """Delete the files with their record, and folders that are empty then.  Raises Conflict."""
    try:
        for path in paths:
            path.unlink(missing_ok=True)
        records.path_of(paths[0]).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise Conflict(f"{printable(str(error.filename))} cannot be deleted: {reason}.") from error
    parent = paths[0].parent
    while parent != folder and parent.is_relative_to(folder):
        with suppress(OSError):  # something else is in it
            parent.rmdir()
        parent = parent.parent
