"""Copies a model of this box under another name, into the models folder."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from pinaivu_box.models import projectors, splits
from pinaivu_box.models import record as records
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.record import ModelRecord
from pinaivu_box.models.regular_files import open_regular

_COPY_BYTES = 1 << 20


def copy_model(
    model: Model, folder: Path, name: str, record: ModelRecord | None = None
) -> list[Path]:
    """Create the model's files as those of `name` in that folder, all of them or none: hard links
    where possible, else copies; and its `record`.  Files of another program are linked by name.
    Returns them in their order.  Raises OSError, such as FileExistsError."""
    if model.is_fake:
        raise OSError("it has no file")
    targets = [folder / each for each in splits.names(name, len(model.files))]
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    files = [*model.files]
    if record is not None and model.projector is not None:
        record = msgspec.structs.replace(record, projector=projectors.name_for(targets[0]))
        path, size = model.projector
        files.append(replace(model, path=path, size=size, offset=0, parts=()))
    if record is not None:
        records.write(targets[0], record)
    copies: list[Path] = []
    try:
        if record is not None and record.projector:
            targets = [*targets, targets[0].with_name(record.projector)]
        for file, target in zip(files, targets, strict=True):
            _copy_file(file, target) if not model.in_cache else target.symlink_to(file.path)
            copies.append(target)
    except BaseException:
        for target in copies:
            target.unlink(missing_ok=True)
        raise
    return copies


def _copy_file(file: Model, target: Path) -> None:
    if file.offset == 0 and file.path.stat().st_size == file.size:
        with suppress(OSError):  # on another file system, or of another user
            os.link(file.path.resolve(), target)
            return
    temporary = target.with_name(f".{target.name}.new")
    try:
        _copy_bytes(file, temporary)
        os.link(temporary, target)  # unlike a rename it replaces nothing
    finally:
        temporary.unlink(missing_ok=True)


def _copy_bytes(file: Model, target: Path) -> None:
    left = file.size
    with open_regular(file.path) as source, target.open("wb") as copy:
        source.seek(file.offset)
        while left and (data := source.read(min(left, _COPY_BYTES))):
            copy.write(data)
            left -= len(data)
        copy.flush()
        os.fsync(copy.fileno())
