"""`[tracing]` of the configuration: where spans of requests are sent."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from pinaivu_box.config_section import Section


class TracingConfig(Section, frozen=True):
    """A collector that takes OTLP over HTTP; off without an `endpoint`.  Its headers are in an
    environment variable or a file, never here."""

    endpoint: str = ""
    headers_env: str = ""
    headers_file: str = ""
    # Of the requests whose clients do not say whether they are traced.
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0
    # Whether peers are told to which trace the requests belong that they serve.
    peers: bool = False


def check(tracing: TracingConfig) -> None:
    """Raises ValueError."""
    try:
        parts = urlsplit(tracing.endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if tracing.endpoint and not (is_url and tracing.endpoint.isascii()):
        raise ValueError(
            f"tracing.endpoint is '{tracing.endpoint[:200]}', which is no URL such as "
            "http://HOST:4318/v1/traces"
        )
    if tracing.endpoint and "@" in parts.netloc:
        raise ValueError(
            "tracing.endpoint holds a password: use tracing.headers_env or headers_file"
        )
    if tracing.headers_env and tracing.headers_file:
        raise ValueError("tracing has both headers_env and headers_file: leave one out")
