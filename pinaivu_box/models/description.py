"""What a box says of one of its models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from pinaivu_box.config import Config, ModelConfig, ModelSettings
from pinaivu_box.models import fit, licenses, memory
from pinaivu_box.models.aliases import Aliases
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.model_fit import ModelFit
from pinaivu_box.models.names import printable
from pinaivu_box.models.overrides import ModelOverrides
from pinaivu_box.models.prices import prices_of

_CONTEXTS = (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_OF_ENGINE = ("kv_type", "devices", "gpu_layers", "split", "tensor_split", "main_device")


class MemoryNeed(Struct, frozen=True):
    """`bytes` that the model takes with a context of so many tokens."""

    context: int
    bytes: int


class ModelDescription(Struct, frozen=True):
    """`context` is what a request may have, `context_length` what the model was made for.

    `template` says whose template writes its chats, and `projector` is the file with which it sees
    images.  `license` is the licence's name, and `license_text` its text.  `digest` is empty if the
    file would have to be read for it.  `settings` are those in force, of which an operator set
    the `overrides`; `configured` is what counts in their place once they are reset.  `fit` is where
    it would go now, if that was asked.
    """

    model: str
    owner: str
    source: str
    architecture: str
    parameters: int
    active_parameters: int
    quantisation: str
    size: int
    context: int
    context_length: int
    template: str
    system: str
    stop: list[str]
    license: str
    license_text: str
    digest: str
    files: list[str]
    projector: str
    aliases: list[str]
    memory: list[MemoryNeed]
    settings: dict[str, Any]
    overrides: dict[str, Any] = {}
    configured: dict[str, Any] = {}
    fit: ModelFit | None = None
    request_id: str = ""


def describe(model: Model, config: Config, aliases: Aliases, digest: str = "") -> ModelDescription:
    """Describe a model of this box, or one that only peers have, of which little is known."""
    header, record = model.header, model.record
    return ModelDescription(
        model=model.id,
        owner=model.owner,
        source=record.source if record is not None else "",
        architecture=header.architecture,
        parameters=header.parameters,
        active_parameters=header.active_parameters,
        quantisation=header.quantisation,
        size=model.size,
        context=0 if model.remote else memory.context_of(model, config.engine.context),
        context_length=0 if model.remote else header.context_length,
        template=_template(model),
        system=record.system if record is not None else "",
        stop=list(model.parameters.stop),
        license=licenses.name_of(model),
        license_text=licenses.text_of(model),
        digest=digest,
        files=[] if model.remote else [printable(str(path)) for path in _paths(model)],
        projector=printable(str(model.projector.path)) if model.projector is not None else "",
        aliases=aliases.of(model.id),
        memory=[] if model.remote or model.is_fake else _needs(model, config),
        settings={} if model.remote else settings_of(model, config),
        overrides=msgspec.to_builtins(model.overrides.as_json()),
        configured={} if model.remote else _configured(model, config),
    )


def settings_of(model: Model, config: Config) -> dict[str, Any]:
    """Return the settings in force for a model: its own, else those for every model."""
    own, engine = model.settings, config.engine
    values = {
        name: value
        for name in ModelSettings.__struct_fields__
        if (value := getattr(own, name)) != getattr(_DEFAULTS, name)
    }
    of_all = {name: getattr(engine, name) for name in _OF_ENGINE}
    settings = {
        **of_all,
        **values,
        "context": memory.context_of(model, engine.context),
        "parallel": own.parallel or engine.max_sequences,
        "keep_alive": own.keep_alive or engine.keep_alive,
        "price": prices_of(model, config.pricing),
        "sampling": _sampling(model, config),
        "pin": own.pin,
        "preload": own.preload,
    }
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    return plain


def _configured(model: Model, config: Config) -> dict[str, Any]:
    """What counts where nobody has set anything, of the settings that can be set."""
    entry = next((each for each in config.model if each.name == model.id), _DEFAULTS)
    settings = settings_of(replace(model, settings=entry), config)
    return {name: settings.get(name) for name in ModelOverrides.__struct_fields__}


def _paths(model: Model) -> list[Path]:
    return [file.path for file in (*model.files, *model.adapter_files)]


_DEFAULTS = ModelConfig(name="")


def _sampling(model: Model, config: Config) -> dict[str, float]:
    """The defaults that apply to requests of this model, as far as the file itself has none."""
    layers = (model.parameters.sampling, config.sampling, model.settings.sampling)
    fields = [item for layer in layers for item in msgspec.structs.asdict(layer).items()]
    return {name: value for name, value in fields if value is not None}


def _template(model: Model) -> str:
    if model.settings.template:
        return f"of the configuration ({printable(model.settings.template)})"
    if model.remote or model.is_fake:
        return ""
    if model.header.has_template:
        return "of the file"
    return "none in the file: that of its family, if this program knows it"


def _needs(model: Model, config: Config) -> list[MemoryNeed]:
    longest = model.header.context_length
    contexts = [context for context in _CONTEXTS if context < longest]
    kv_type = model.settings.kv_type or config.engine.kv_type
    return [MemoryNeed(n, fit.on_cpu(model.header, n, kv_type)) for n in [*contexts, longest]]
