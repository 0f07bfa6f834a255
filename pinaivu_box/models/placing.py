"""Gives a model that is here a file of its own in the models folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pinaivu_box.models.catalog import Model

_COPY_BYTES = 1 << 20


def place(model: Model, target: Path) -> None:
    """The model's file as `target`, which is not there yet: a link to it where that can be, else a
    copy.  Raises OSError, FileExistsError among them."""
    if model.is_fake:
        raise OSError("it has no file")
    target.parent.mkdir(parents=True, exist_ok=True)
    if model.offset == 0 and model.path.stat().st_size == model.size:
        with suppress(OSError):  # on another file system, or of another user
            os.link(model.path.resolve(), target)
            return
    temporary = target.with_name(f".{target.name}.new")
    try:
        _copy(model, temporary)
        os.link(temporary, target)  # unlike a rename it replaces nothing
    finally:
        temporary.unlink(missing_ok=True)


def _copy(model: Model, target: Path) -> None:
    left = model.size
    with model.path.open("rb") as source, target.open("wb") as file:
        source.seek(model.offset)
        while left and (data := source.read(min(left, _COPY_BYTES))):
            file.write(data)
            left -= len(data)
        file.flush()
        os.fsync(file.fileno())
