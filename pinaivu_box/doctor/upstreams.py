"""Whether the upstreams of the configuration answer, and take their keys."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import urlsplit

from pinaivu_box.config import Config
from pinaivu_box.doctor.check import Check
from pinaivu_box.errors import CliError
from pinaivu_box.registry.reference import is_loopback
from pinaivu_box.secret import Secret, read_secret
from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream_config import UpstreamConfig

_NAME = "upstream"


def configured(config: Config) -> Iterator[Check]:
    """A check of each; none if there are none."""
    for settings in config.upstream:
        try:
            key = read_secret(f"upstream {settings.name}", settings.key_env, settings.key_file)
        except CliError as error:
            todo = "if only the server has that variable, this says nothing"
            yield Check(_NAME, "warning", error.message.removesuffix("."), todo)
            continue
        yield asyncio.run(_look(settings, key))


async def _look(settings: UpstreamConfig, key: Secret | None) -> Check:
    upstream = Upstream(settings, key, "")
    try:
        await upstream.look()
    finally:
        await upstream.client.aclose()
    where = f"{settings.name} ({settings.url})"
    if upstream.down is not None:
        todo = "check its url, its key and the server"
        return Check(_NAME, "failed", f"{where} {upstream.down}", todo)
    parts = urlsplit(settings.url)
    if key is not None and parts.scheme == "http" and not is_loopback(parts.netloc):
        return Check(_NAME, "warning", f"{where} gets its key without TLS", "use https")
    return Check(_NAME, "ok", f"{where} serves {len(upstream.models)} models")
