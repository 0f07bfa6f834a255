"""What a registry says about a model, kept beside its first file as `FILE.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.engine.messages import SamplingDefaults
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.names import is_model_id
from pinaivu_box.models.regular_files import open_regular

_MAX_BYTES = 4 * 1024 * 1024  # more than what `registry.manifest` takes, escaped as JSON

StopString = Annotated[str, Meta(min_length=1, max_length=256)]


class ModelParameters(SamplingDefaults, frozen=True, omit_defaults=True):
    """A model's own defaults, under Ollama's names."""

    num_ctx: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    stop: Annotated[tuple[StopString, ...], Meta(max_length=64)] = ()

    @classmethod
    def parse(cls, text: str) -> ModelParameters:
        """Each parameter in that JSON that is valid: one that is not, or that is unknown, is of a
        newer registry, and is left out."""
        try:
            raw = msgspec.json.decode(text or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            return cls()
        valid = {}
        for name in cls.__struct_fields__:
            if name in raw:
                try:
                    msgspec.convert({name: raw[name]}, cls)
                except msgspec.ValidationError:
                    continue
                valid[name] = raw[name]
        return msgspec.convert(valid, cls)

    @property
    def sampling(self) -> SamplingDefaults:
        return SamplingDefaults(self.temperature, self.top_p, self.top_k, self.min_p)


NO_PARAMETERS = ModelParameters()


class ModelRecord(Struct, frozen=True, omit_defaults=True):
    """`id` is what the model is called, `source` where it came from, `license` the licence's name
    or text, `system` the system prompt that its publisher recommends, `projector` the name of the
    file beside it with which it sees images ("": it sees none)."""

    id: str
    source: str = ""
    license: str = ""
    system: str = ""
    parameters: ModelParameters = msgspec.field(default_factory=ModelParameters)
    projector: str = ""


def path_of(file: Path) -> Path:
    """Where the record of a model's first file is."""
    return file.with_name(f"{file.name}.json")


def read(file: Path) -> ModelRecord | None:
    """The record of a model's first file, if it has one.  Raises BadGguf, OSError."""
    path = path_of(file)
    if not os.path.lexists(path):
        return None
    with open_regular(path) as source:
        data = source.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too long")
        record = msgspec.json.decode(data, type=ModelRecord)
        if not is_model_id(record.id):
            raise ValueError("its id is no model id")
        if record.projector != Path(record.projector).name:
            raise ValueError("its projector is not the name of a file")
    except (ValueError, RecursionError) as error:
        raise BadGguf(f"its record {path.name} is damaged ({error}): pull it again") from error
    return record


def write(file: Path, record: ModelRecord) -> None:
    """Write the record of a model's first file, which may not exist yet.  Raises OSError."""
    path = path_of(file)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as target:
        target.write(msgspec.json.format(msgspec.json.encode(record), indent=2))
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)
