"""The settings in force: the configuration, and what was read for it.

They are immutable, and a reload replaces them as a whole.  Whoever needs a setting keeps the
`LiveSettings` and reads it when it needs it, so nobody has an old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pinaivu_box.config import Config, EngineConfig
from pinaivu_box.errors import CliError, quoted
from pinaivu_box.models import catalog_loader
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.names import RULE, is_model_id
from pinaivu_box.models.regular_files import open_regular
from pinaivu_box.secret import Secret, read_secret
from pinaivu_box.tls import certificate as certificates
from pinaivu_box.tls.certificate import ServerCertificate
from pinaivu_box.tracing_headers import read_headers

MAX_SHARED_PREFIXES_BYTES = 256 * 1024  # of all texts; more than a context holds


@dataclass(frozen=True)
class BoxSettings:
    """The configuration, the models that are served, the texts of `[engine] shared_prefixes`, the
    keys of upstreams by their names, the server's certificate, the secret of the client of
    `[login.oidc]`, and the headers of `[tracing]`.

    The catalog also changes when files come into the models folder or go.
    """

    config: Config
    catalog: Catalog = field(default_factory=lambda: Catalog({}))
    shared_prefixes: tuple[str, ...] = ()
    upstream_keys: Mapping[str, Secret] = field(default_factory=dict)
    certificate: ServerCertificate | None = None  # None: plain HTTP
    oidc_secret: Secret | None = None
    tracing_headers: Secret | None = None


class LiveSettings:
    """The `current` settings."""

    def __init__(self, current: BoxSettings) -> None:
        self.current = current

    @property
    def config(self) -> Config:
        return self.current.config

    @property
    def catalog(self) -> Catalog:
        return self.current.catalog

    def address_of_upstream(self, name: str) -> tuple[str, int] | None:
        """Its host and port."""
        for upstream in self.config.upstream:
            if upstream.name == name:
                parts = urlsplit(upstream.url)
                return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        return None


def read(config: Config, home: Path, headers: HeaderReader) -> BoxSettings:
    """Read what the configuration names; model files may take long, so do it in a thread.

    Raises CliError.
    """
    keys = read_upstream_keys(config)
    oidc_secret = read_oidc_secret(config)
    tracing_headers = read_headers(config.tracing)
    certificate = certificates.of(config.server, home)
    catalog = catalog_loader.load(config, home, headers)
    prefixes = read_shared_prefixes(config.engine)
    return BoxSettings(config, catalog, prefixes, keys, certificate, oidc_secret, tracing_headers)


def read_oidc_secret(config: Config) -> Secret | None:
    """The secret of the client of `[login.oidc]`, None if it has none.  Raises CliError."""
    oidc = config.login.oidc
    if not oidc.issuer:
        return None
    return read_secret("login.oidc", oidc.client_secret_env, oidc.client_secret_file)


def read_upstream_keys(config: Config) -> dict[str, Secret]:
    """The keys that upstreams have, by the names of these.  Raises CliError, also for a name of one
    of their models that none can have here."""
    for each in config.upstream:
        for name in each.models:
            if not is_model_id(name.replace("*", "x")):
                raise CliError(
                    f"upstream {each.name}: '{quoted(name)}' is no name of a model ({RULE}): give "
                    'the model another name here, as in { "NAME" = "NAME THERE" }.'
                )
    found = {
        each.name: read_secret(f"upstream {each.name}", each.key_env, each.key_file)
        for each in config.upstream
    }
    return {name: key for name, key in found.items() if key is not None}


def read_shared_prefixes(config: EngineConfig) -> tuple[str, ...]:
    """The texts of `[engine] shared_prefixes`, files read.  Raises CliError."""
    texts = [_text(entry.file) if entry.file else entry.text for entry in config.shared_prefixes]
    if sum(len(text.encode()) for text in texts) > MAX_SHARED_PREFIXES_BYTES:
        raise CliError(
            f"engine.shared_prefixes: the texts have more than {MAX_SHARED_PREFIXES_BYTES} bytes."
        )
    return tuple(text.rstrip() for text in texts)  # a file ends with a newline, a prompt need not


def _text(path: str) -> str:
    try:
        with open_regular(Path(path).expanduser()) as file:
            data = file.read(MAX_SHARED_PREFIXES_BYTES + 1)
        if len(data) > MAX_SHARED_PREFIXES_BYTES:
            raise ValueError(f"it has more than {MAX_SHARED_PREFIXES_BYTES} bytes")
        text = data.decode()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        reason = getattr(error, "strerror", None) or why
        raise CliError(f"engine.shared_prefixes: {path} cannot be read: {reason}.") from error
    if not text.strip():
        raise CliError(f"engine.shared_prefixes: {path} is empty: write the prefix into it.")
    return text
