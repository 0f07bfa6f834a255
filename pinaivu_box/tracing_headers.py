"""The headers that a collector of spans wants, which are a secret."""

from __future__ import annotations

import re
from urllib.parse import unquote

from pinaivu_box.errors import CliError
from pinaivu_box.secret import Secret, read_secret
from pinaivu_box.tracing_config import TracingConfig

_PAIR = re.compile(r"(?P<name>[A-Za-z0-9_-]{1,100})=(?P<value>[!-+\--~]{1,8000})")
_VALUE = re.compile("[ -~]+")


def read_headers(tracing: TracingConfig) -> Secret | None:
    """None if there are none.  Raises CliError."""
    if not tracing.endpoint:
        return None
    secret = read_secret("tracing", tracing.headers_env, tracing.headers_file)
    if secret is not None:
        try:
            headers_in(secret.reveal())
        except ValueError:
            raise CliError(
                "tracing: the headers are not written as NAME=VALUE,NAME=VALUE, with percent "
                "signs for spaces and commas, as in Authorization=Bearer%20TOKEN."
            ) from None
    return secret


def headers_in(text: str) -> dict[str, str]:
    """Headers in the format of OTEL_EXPORTER_OTLP_HEADERS.  Raises ValueError."""
    headers = {}
    for pair in text.split(","):
        match = _PAIR.fullmatch(pair)
        value = unquote(match["value"]) if match is not None else ""
        if match is None or not _VALUE.fullmatch(value):
            raise ValueError("not a list of headers")
        headers[match["name"]] = value
    return headers
