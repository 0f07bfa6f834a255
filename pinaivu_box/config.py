"""Configuration: TOML file, then `PINAIVU_*` environment, then command line; frozen structs.

`sample.toml` documents every key with its default, and a test proves that it does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
from msgspec import Meta

from pinaivu_box import (
    amount,
    login_config,
    peering_config,
    server_config,
    tracing_config,
    upstream_config,
)
from pinaivu_box.amount import Prices
from pinaivu_box.config_section import PositiveInt, Section, Weight
from pinaivu_box.engine.messages import Exact, KvType, SamplingDefaults, Split
from pinaivu_box.errors import CliError, ConfigurationInvalid
from pinaivu_box.login_config import LoginConfig
from pinaivu_box.peering_config import BEYOND, PeeringConfig, WitnessConfig
from pinaivu_box.server_config import ServerConfig
from pinaivu_box.text import whole
from pinaivu_box.tracing_config import TracingConfig
from pinaivu_box.upstream_config import UpstreamConfig

Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # llama.cpp counts them in 32 bits
GpuLayers = Annotated[int, Meta(ge=0)] | Literal["auto"]


class SharedPrefix(Section, frozen=True):
    """The beginning of prompts: a `text`, or the path of a `file` with one."""

    text: str = ""
    file: str = ""


class EngineConfig(Section, frozen=True):
    context: Tokens = 0
    max_sequences: Annotated[int, Meta(ge=1, le=256)] = 64
    kv_tokens: Tokens = 0
    token_budget: Annotated[int, Meta(ge=32, le=2**31 - 1)] = 512
    threads: Annotated[int, Meta(ge=0, le=512)] = 0  # GGML_MAX_N_THREADS
    devices: tuple[str, ...] = ()
    gpu_layers: GpuLayers = "auto"
    split: Split = "layer"
    tensor_split: tuple[Weight, ...] = ()
    main_device: str = ""
    kv_type: KvType = "f16"
    exact: Exact = "auto"
    cpu_variant: Annotated[str, Meta(pattern=whole("[a-z0-9_.]{0,64}"))] = ""
    drafting: bool = True
    context_shift: bool = False
    parse_special: bool = False
    shared_prefixes: Annotated[tuple[SharedPrefix, ...], Meta(max_length=64)] = ()
    max_queue: Annotated[int, Meta(ge=0)] = 256
    keep_alive: str = "5m"
    max_keep_alive: str = "1h"  # the maximum for a request
    start_seconds: Annotated[float, Meta(gt=0)] = 300.0
    saved_prefixes_mb: Annotated[int, Meta(ge=0)] = 1000


class SamplingConfig(Section, SamplingDefaults, frozen=True):
    """Overrides of the defaults in the model file or in llama.cpp."""


class PricingConfig(Section, frozen=True):
    currency: str = "credits"
    per_1k_tokens: str | Prices = "0"
    per_billion: str | Prices = ""
    models: dict[str, str | Prices] = {}


class RetentionConfig(Section, frozen=True):
    """How long rows are kept; a negative duration is for ever.

    The stored responses of a key are also limited in number and in MB (10^6 bytes): the oldest are
    deleted first.
    """

    requests: str = "90d"
    receipts: str = "-1"
    responses: str = "30d"
    responses_per_key: PositiveInt = 10_000
    responses_mb_per_key: Annotated[float, Meta(gt=0)] = 100.0


class ReceiptsConfig(Section, frozen=True):
    """What is kept beside receipts."""

    transcripts: Literal["none", "sealed", "plain"] = "none"


class AuditConfig(Section, frozen=True):
    """The share of what peers serve that is computed again: `sample`, and `first` of what each
    serves first, and after a failed audit."""

    sample: Annotated[float, Meta(ge=0, le=1)] = 0.01
    first: Annotated[float, Meta(ge=0, le=1)] = 0.2


class ExplorerConfig(Section, frozen=True):
    """Who may open it: "login", keys and sessions, or "public", everybody."""

    access: Literal["login", "public"] = "login"


class RegistryConfig(Section, frozen=True):
    """Base URLs of the registries behind short names."""

    ollama: str = "https://registry.ollama.ai"
    hub: str = "https://huggingface.co"


class LogConfig(Section, frozen=True):
    level: str = "info"
    format: str = "text"


class AdapterConfig(Section, frozen=True):
    """A LoRA adapter: a GGUF file, and how much of it is added to the model."""

    path: str
    scale: float = 1.0


class ModelSettings(Section, frozen=True):
    """The settings of one model.  Those that are 0, empty or None are as for every model."""

    context: Tokens = 0
    parallel: Annotated[int, Meta(ge=0, le=256)] = 0
    sampling: SamplingConfig = SamplingConfig()
    template: str = ""
    kv_type: KvType | None = None
    exact: Exact | None = None
    devices: tuple[str, ...] | None = None
    gpu_layers: GpuLayers | None = None
    split: Split | None = None
    tensor_split: tuple[Weight, ...] | None = None
    main_device: str | None = None
    pin: bool = False
    preload: bool = False
    keep_alive: str = ""
    price: str | Prices = ""
    draft: str = ""
    adapters: tuple[AdapterConfig, ...] = ()
    projector: str = ""


class ModelConfig(ModelSettings, frozen=True, kw_only=True):
    """A model file, or without a path the settings of a model that has one already: in the models
    folder, or bundled."""

    name: str
    path: str = ""


class Config(Section, frozen=True):
    models_dir: str = ""
    model_caches: tuple[str, ...] = ()
    server: ServerConfig = ServerConfig()
    login: LoginConfig = LoginConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    pricing: PricingConfig = PricingConfig()
    retention: RetentionConfig = RetentionConfig()
    receipts: ReceiptsConfig = ReceiptsConfig()
    audit: AuditConfig = AuditConfig()
    peering: PeeringConfig = PeeringConfig()
    witness: WitnessConfig = WitnessConfig()
    registry: RegistryConfig = RegistryConfig()
    explorer: ExplorerConfig = ExplorerConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()
    aliases: dict[str, str] = {}
    model: list[ModelConfig] = []
    upstream: list[UpstreamConfig] = []


# Environment variable -> path of the setting.
ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "PINAIVU_HOST": ("server", "host"),
    "PINAIVU_PORT": ("server", "port"),
    "PINAIVU_MODELS": ("models_dir",),
    "PINAIVU_KEEP_ALIVE": ("engine", "keep_alive"),
    "PINAIVU_MAX_QUEUE": ("engine", "max_queue"),
    "PINAIVU_PEERING_ENABLED": ("peering", "enabled"),
    "PINAIVU_PEERING_PORT": ("peering", "port"),
    "PINAIVU_LOG_LEVEL": ("log", "level"),
    "PINAIVU_LOG_FORMAT": ("log", "format"),
}

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
_CACHES = ("ollama", "lm-studio", "llama.cpp")
_DURATION = re.compile(r"(-?[0-9]{1,15}(?:\.[0-9]{1,15})?) *(ms|s|m|h|d)?")
MAX_ADAPTER_SCALE = 1000
_MAX_DURATION_SECONDS = 365_250 * 86400.0
_MIN_RETENTION_SECONDS = 7200.0
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """`PINAIVU_HOME`, or the platform's data directory (XDG on Linux)."""
    chosen = environ.get("PINAIVU_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("pinaivu", appauthor=False))


def parse_duration(text: str) -> float:
    """The seconds of `"5m"`, `"30d"` or `"90"` (seconds); may be negative, which means "never".

    Raises ValueError.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a duration, such as 90s, 5m, 12h or 30d")
    seconds = float(match[1]) * _UNIT_SECONDS[match[2] or "s"]
    if abs(seconds) > _MAX_DURATION_SECONDS:
        raise ValueError(f"'{text[:40]}' is more than 1000 years")
    return seconds


def parse_span(text: str) -> float:
    """As `parse_duration`, but a unit is required, except for 0: 30 could mean days.

    Raises ValueError.
    """
    seconds = parse_duration(text)
    if seconds and not text.strip().endswith(tuple(_UNIT_SECONDS)):
        raise ValueError(f"'{text}' has no unit: write {text}d, {text}h or {text}s, for example")
    return seconds


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[tuple[str, ...], Any] | None = None,
    extra_models: list[ModelConfig] | None = None,
) -> Config:
    """Read, merge and check the configuration.  Raises CliError, and ConfigurationInvalid below."""
    tree = _read(path) if path else {}
    for variable, keys in ENVIRONMENT.items():
        if variable in environ:
            _put(tree, keys, environ[variable])
    for keys, value in (overrides or {}).items():
        if value is not None:
            _put(tree, keys, value)
    where = f"The configuration {path}" if path else "The configuration"
    try:
        # strict=False: values from the environment arrive as text.
        config = msgspec.convert(tree, Config, strict=False)
        config = msgspec.structs.replace(config, model=[*config.model, *(extra_models or [])])
        _check(config)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationInvalid(f"{where} is not valid: {_clause(error)}.") from error
    return config


def _clause(error: Exception) -> str:
    """What is wrong, after the name of the setting."""
    text = str(error).replace("Object contains unknown field", "unknown setting")
    message, at, path = text.partition(" - at `$.")
    return f"{path.rstrip('`')}: {message[0].lower()}{message[1:]}" if at else message


def differences(old: Config, new: Config) -> list[str]:
    """The dotted names of the settings in which two configurations differ."""
    before, after = _settings(old), _settings(new)
    return [name for name, value in before.items() if value != after[name]]


def _settings(section: Section, path: str = "") -> dict[str, Any]:
    """The settings by their dotted names."""
    settings: dict[str, Any] = {}
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            settings |= _settings(value, f"{path}{name}.")
        else:
            settings[f"{path}{name}"] = value
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        reason = error.strerror or error
        raise CliError(f"The configuration {path} cannot be read: {reason}.") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigurationInvalid(
            f"The configuration {path} is not valid TOML: {error}."
        ) from error


def _put(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        inner: Any = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # the file has another type there, which the type check reports
        tree = inner
    tree[keys[-1]] = value


def _check(config: Config) -> None:
    for name, value in _settings(config).items():
        # These pass the bounds of a type.
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, not a finite number")
    for name in config.model_caches:
        if name not in _CACHES and not name.startswith(("/", "~")):
            raise ValueError(
                f"model_caches has '{name}', which is neither {', '.join(_CACHES)} nor the path of "
                "a folder"
            )
    parse_duration(config.engine.keep_alive)
    parse_duration(config.engine.max_keep_alive)
    server_config.check(config.server)
    login_config.check(config.login)
    tracing_config.check(config.tracing)
    for entry in config.engine.shared_prefixes:
        if bool(entry.text.strip()) == bool(entry.file):
            raise ValueError(
                "engine.shared_prefixes: each entry needs either a text or a file, such as "
                '{ file = "system.txt" }'
            )
    for name in ("requests", "receipts", "responses"):
        text = getattr(config.retention, name)
        if 0 <= parse_duration(text) < _MIN_RETENTION_SECONDS:
            raise ValueError(
                f"retention.{name} is '{text}': it must be at least 2h, which limits need"
            )
    for name, choice, choices in (
        ("log.level", config.log.level, LOG_LEVELS),
        ("log.format", config.log.format, LOG_FORMATS),
        ("peering.serve.beyond", config.peering.serve.beyond, BEYOND),
    ):
        if choice not in choices:
            raise ValueError(f"{name} is '{choice}', not one of {', '.join(choices)}")
    peering_config.check_peering(config.peering)
    peering_config.check_witness(config.witness)
    amount.check("pricing.per_1k_tokens", config.pricing.per_1k_tokens, amount.prices)
    amount.check("pricing.per_billion", config.pricing.per_billion or "0", amount.prices)
    for name, price in config.pricing.models.items():
        amount.check(f'pricing.models."{name}"', price, amount.prices)
    for model in config.model:
        amount.check(f"the price of model {model.name}", model.price or "0", amount.prices)
        if model.keep_alive:
            parse_duration(model.keep_alive)
        _check_adapters(model)
    names = [model.name for model in config.model]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the model name {sorted(doubled)[0]} is used twice")
    for upstream in config.upstream:
        upstream_config.check(upstream)
    names = [upstream.name for upstream in config.upstream]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the upstream name {sorted(doubled)[0]} is used twice")


def _check_adapters(entry: ModelConfig) -> None:
    if entry.adapters and not entry.path:
        raise ValueError(
            f"the model {entry.name} has adapters and no path: with adapters it is another model, "
            "so write an entry with a name of its own, the path of the base and the adapters"
        )
    for adapter in entry.adapters:
        if not abs(adapter.scale) <= MAX_ADAPTER_SCALE:  # also true of NaN
            raise ValueError(
                f"the scale of the adapter {adapter.path} of {entry.name} is {adapter.scale}: it "
                f"must be from -{MAX_ADAPTER_SCALE} to {MAX_ADAPTER_SCALE}"
            )
