"""Settings of models that operators set while the box ran, which a file in the home holds.

Each counts before the same setting of the configuration until it is reset; the others are as
configured.  What names files or devices of the machine is left to the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.config import GpuLayers, ModelSettings, SamplingConfig, parse_duration
from pinaivu_box.engine.messages import KvType
from pinaivu_box.models import home_file
from pinaivu_box.models.names import is_model_id

FILE_NAME = "model_settings.json"
MAX_MODELS = 1000  # that have some
# They count for engines that are started from then on; the others count at once.
OF_ENGINES = ("context", "parallel", "kv_type", "gpu_layers")

Context = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Parallel = Annotated[int, Meta(ge=1, le=256)]
KeepAlive = Annotated[str, Meta(min_length=1, max_length=40)]


class ModelOverrides(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Those of one model, as in `[[model]]`; None where the configuration counts."""

    context: Context | None = None
    parallel: Parallel | None = None
    kv_type: KvType | None = None
    gpu_layers: GpuLayers | None = None
    keep_alive: KeepAlive | None = None
    pin: bool | None = None
    preload: bool | None = None
    sampling: SamplingConfig = SamplingConfig()

    def applied_to(self, settings: ModelSettings) -> ModelSettings:
        """The settings with these in place of their own."""
        sampling = msgspec.structs.replace(settings.sampling, **_given(self.sampling))
        return msgspec.structs.replace(settings, **{**_given(self), "sampling": sampling})

    def as_json(self) -> dict[str, Any]:
        """Those that are set, and nothing else."""
        given = _given(self)
        if sampling := _given(given.pop("sampling")):
            given["sampling"] = sampling
        return given


NONE = ModelOverrides()


def _given(values: Struct) -> dict[str, Any]:
    fields = msgspec.structs.asdict(values)
    return {name: value for name, value in fields.items() if value is not None}


def changed(overrides: ModelOverrides, changes: Mapping[str, Any]) -> ModelOverrides:
    """The overrides with these changes, as in JSON: null resets a setting.

    Raises msgspec.ValidationError, and ValueError for a duration that is none.
    """
    merged = {**overrides.as_json(), **changes}
    if changes.get("sampling") is not None:
        merged["sampling"] = {**_given(overrides.sampling), **changes["sampling"]}
    given = {name: value for name, value in merged.items() if value is not None}
    result = msgspec.convert(given, ModelOverrides)
    if result.keep_alive is not None:
        parse_duration(result.keep_alive)
    return result


def read(home: Path) -> dict[str, ModelOverrides]:
    """The overrides by the ids of models.  Raises CliError."""
    path = home / FILE_NAME
    made = home_file.read(path, dict[str, ModelOverrides], {})
    try:
        if len(made) > MAX_MODELS or not all(map(is_model_id, made)):
            raise ValueError("it does not hold names of models")
        for each in made.values():
            changed(each, {})
    except ValueError as error:
        raise home_file.unreadable(path, error) from error
    return made


def write(made: Mapping[str, ModelOverrides], home: Path) -> None:
    """Store them.  Raises OSError."""
    given = {model: each.as_json() for model, each in made.items() if each != NONE}
    home_file.write(home / FILE_NAME, given)
