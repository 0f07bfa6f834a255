"""Configuration: TOML file, then `PINAIVU_*` environment, then command line; frozen structs.

`sample.toml` documents every key with its default, and a test proves that it does.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
import platformdirs
from msgspec import Meta

from pinaivu_box import amount, login_config, server_config, tracing_config
from pinaivu_box.amount import Prices
from pinaivu_box.config_section import Port, PositiveInt, Section
from pinaivu_box.engine.messages import Exact, KvType, SamplingDefaults, Split
from pinaivu_box.errors import CliError, ConfigurationInvalid
from pinaivu_box.login_config import LoginConfig
from pinaivu_box.server_config import ServerConfig
from pinaivu_box.text import NO_CONTROLS, whole
from pinaivu_box.tracing_config import TracingConfig

Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # llama.cpp counts them in 32 bits
Weight = Annotated[float, Meta(ge=0)]
GpuLayers = Annotated[int, Meta(ge=0)] | Literal["auto"]
RoutingPolicy = Literal["prefer-local", "never", "balance", "cheapest"]
_Amount = TypeVar("_Amount", bound=str | Prices)


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


class PeeringServeConfig(Section, frozen=True):
    """The limits of peers; `pinaivu peers edit` sets others for one of them."""

    max_parallel: PositiveInt = 8
    tokens_per_minute: Annotated[int, Meta(ge=0)] = 0
    credit_limit: str = ""
    beyond: str = "idle"
    models: tuple[str, ...] = ("*",)
    hours: str = ""
    copy_mb_per_s: Annotated[float, Meta(ge=0)] = 0.0


class PeeringConfig(Section, frozen=True):
    enabled: bool = False
    host: str = "0.0.0.0"  # noqa: S104 - peers are on other machines, and authenticate
    port: Port = 4002
    relay: str = "none"
    name: Annotated[str, Meta(max_length=64, pattern=NO_CONTROLS)] = ""
    announce: bool = False
    advertise: Annotated[tuple[str, ...], Meta(max_length=4)] = ()
    policy: RoutingPolicy = "prefer-local"
    same_name: bool = False
    share_models: bool = True
    price_weight: Weight = 0.4
    time_weight: Weight = 0.3
    reputation_weight: Weight = 0.3
    hedge_ms: Annotated[int, Meta(ge=0)] = 0
    max_price: str = ""
    max_debt: str = ""
    serve: PeeringServeConfig = PeeringServeConfig()


class WitnessConfig(Section, frozen=True):
    """Beside the members of the network: `logs` that this box witnesses, each a node id or the key
    of a log as other programs write it (NAME+ID+BASE64), and `urls` of witnesses for its own log:
    boxes, and with a key before them other programs.
    """

    logs: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    urls: Annotated[tuple[str, ...], Meta(max_length=32)] = ()


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


class UpstreamConfig(Section, frozen=True, kw_only=True):
    """Another server with OpenAI's API; `url` is that of its `/models` without it.

    `models` are its names, with `*` for any characters, or names here with the names there.  The
    key is in an environment variable or a file, never here.  `price` is that of all its models,
    `prices` of single ones by their names here.
    """

    name: str
    url: str
    models: tuple[str, ...] | dict[str, str] = ("*",)
    key_env: str = ""
    key_file: str = ""
    concurrency: PositiveInt = 32
    price: str | Prices = ""
    prices: dict[str, str | Prices] = {}
    health: Literal["models", "health", "none"] = "models"
    health_seconds: Annotated[float, Meta(ge=0.1)] = 15.0
    connect_seconds: Annotated[float, Meta(gt=0)] = 5.0
    first_token_seconds: Annotated[float, Meta(gt=0)] = 300.0
    stall_seconds: Annotated[float, Meta(gt=0)] = 60.0
    openai_only: bool = False
    for_peers: bool = False


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
_BEYOND = ("idle", "refuse")
_CACHES = ("ollama", "lm-studio", "llama.cpp")
HOURS = re.compile("([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")
_URL = re.compile(r"https?://[!-~]{1,90}")
_UPSTREAM_URL = re.compile(r"https?://[!-~]{1,2000}")
_KEY = re.compile(r"[^\s+]{1,256}\+[0-9a-f]{8}\+[A-Za-z0-9+/]{44}")  # of a log, or a witness
_LOG = re.compile(f"node_[0-9a-f]{{64}}|{_KEY.pattern}")
_UPSTREAM_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST_PORT = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,88}[A-Za-z0-9])?)"
    r":(?P<port>[0-9]{1,5})"
)
_DURATION = re.compile(r"(-?[0-9]{1,15}(?:\.[0-9]{1,15})?) *(ms|s|m|h|d)?")
MAX_ADAPTER_SCALE = 1000
_MAX_DURATION_SECONDS = 365_250 * 86400.0
_MIN_RETENTION_SECONDS = 7200.0
_MIN_COPY_MB_PER_S = 0.1  # at less, a piece takes longer than a peer waits for it
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
        ("peering.serve.beyond", config.peering.serve.beyond, _BEYOND),
    ):
        if choice not in choices:
            raise ValueError(f"{name} is '{choice}', not one of {', '.join(choices)}")
    _check_peering(config.peering)
    _check_witness(config.witness)
    check_amount("pricing.per_1k_tokens", config.pricing.per_1k_tokens, amount.prices)
    check_amount("pricing.per_billion", config.pricing.per_billion or "0", amount.prices)
    for name, price in config.pricing.models.items():
        check_amount(f'pricing.models."{name}"', price, amount.prices)
    for model in config.model:
        check_amount(f"the price of model {model.name}", model.price or "0", amount.prices)
        if model.keep_alive:
            parse_duration(model.keep_alive)
        _check_adapters(model)
    names = [model.name for model in config.model]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the model name {sorted(doubled)[0]} is used twice")
    for upstream in config.upstream:
        _check_upstream(upstream)
    names = [upstream.name for upstream in config.upstream]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the upstream name {sorted(doubled)[0]} is used twice")


def _check_upstream(upstream: UpstreamConfig) -> None:
    if not _UPSTREAM_NAME.fullmatch(upstream.name):
        raise ValueError(
            f"the upstream name '{upstream.name[:80]}' is not made of letters, digits, '.', '_' "
            "and '-'"
        )
    where = f"upstream {upstream.name}"
    try:
        parts = urlsplit(upstream.url)
        is_base = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        is_base = False
    if not is_base or not _UPSTREAM_URL.fullmatch(upstream.url):
        raise ValueError(
            f"{where}: its url is no base URL such as https://HOST/v1 or http://HOST:8000/v1"
        )
    if "@" in parts.netloc:
        raise ValueError(f"{where}: its url holds a password: use key_env or key_file")
    if upstream.key_env and upstream.key_file:
        raise ValueError(f"{where}: it has both key_env and key_file: leave one out")
    if not upstream.models or not all(upstream.models):
        raise ValueError(f'{where}: it has no models: write ["*"] for all that it has')
    check_amount(f"{where}: its price", upstream.price or "0", amount.prices)
    for model, price in upstream.prices.items():
        check_amount(f'{where}: its price of "{model}"', price, amount.prices)


def _check_witness(witness: WitnessConfig) -> None:
    for text in witness.logs:
        if not _LOG.fullmatch(text):
            raise ValueError(
                f"witness.logs has '{text[:80]}', which is neither a node id ('pinaivu id') nor a "
                "log's key as in NAME+ID+BASE64"
            )
    for text in witness.urls:
        key, _, url = text.rpartition(" ")
        if (
            not _UPSTREAM_URL.fullmatch(url)
            or not urlsplit(url).hostname
            or not (url == text or _KEY.fullmatch(key))
        ):
            raise ValueError(
                f"witness.urls has '{text[:80]}', which is no URL such as "
                "https://HOST:4001/v1/witness, and none after a witness's key as in NAME+ID+BASE64"
            )


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


def _check_peering(peering: PeeringConfig) -> None:
    try:
        ipaddress.ip_address(peering.host)
    except ValueError:
        raise ValueError(f"peering.host is '{peering.host}', not an IP address") from None
    if peering.relay not in ("none", "n0") and not _is_url(peering.relay):
        raise ValueError(
            f"peering.relay is '{peering.relay}', not none, n0 or the URL of a relay, such as "
            "https://HOST or https://HOST:PORT"
        )
    for address in peering.advertise:
        if not is_host_port(address):
            raise ValueError(
                f"peering.advertise has '{address}', which is not HOST:PORT or [IPv6]:PORT"
            )
    if peering.serve.hours and not HOURS.fullmatch(peering.serve.hours):
        raise ValueError(f"peering.serve.hours is '{peering.serve.hours}', not as in 18:00-08:00")
    if 0 < peering.serve.copy_mb_per_s < _MIN_COPY_MB_PER_S:
        raise ValueError(
            f"peering.serve.copy_mb_per_s is {peering.serve.copy_mb_per_s:g}: it must be at least "
            f"{_MIN_COPY_MB_PER_S:g}, or 0 for no limit"
        )
    if not peering.price_weight + peering.time_weight + peering.reputation_weight > 0:
        raise ValueError(
            "peering.price_weight, time_weight and reputation_weight must not all be 0"
        )
    check_amount("peering.serve.credit_limit", peering.serve.credit_limit or "0", amount.parse)
    check_amount("peering.max_debt", peering.max_debt or "0", amount.parse)
    check_amount("peering.max_price", peering.max_price or "0", amount.per_token)


def check_amount(name: str, value: _Amount, read: Callable[[_Amount], object]) -> None:
    """Check that `read` can read the value.  Raises ValueError that begins with the name."""
    try:
        read(value)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from error


def is_host_port(text: str) -> bool:
    """Whether the text is HOST:PORT or [IPv6]:PORT."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        return False
    try:
        return match["v6"] is None or ipaddress.ip_address(match["v6"]).version == 6
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    """Whether the text is an HTTP URL, short enough to be an address of a box."""
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and _URL.fullmatch(text) is not None
