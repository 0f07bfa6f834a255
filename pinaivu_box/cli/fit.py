"""What `pinaivu show --fit` prints."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import click

from pinaivu_box.cli.render import Column, print_table
from pinaivu_box.text import megabytes

_COLUMNS = (
    Column("DEVICE", itemgetter("device")),
    Column("LAYERS", lambda part: str(part["layers"]), number=True),
    Column("WEIGHTS", lambda part: megabytes(part["weights"]), drop=2, number=True),
    Column("KV CACHE", lambda part: megabytes(part["cache"]), drop=2, number=True),
    Column("BUFFERS", lambda part: megabytes(part["compute"]), drop=2, number=True),
    Column("OTHER", lambda part: megabytes(part["other"]), drop=3, number=True),
    Column("IN ALL", lambda part: megabytes(part["total"]), number=True),
    Column("FREE NOW", lambda part: megabytes(part["free"]), drop=1, number=True),
    Column("LEFT", lambda part: megabytes(part["left"]), number=True),
)


def print_fit(fit: Mapping[str, Any]) -> None:
    """Print where the model would go."""
    if not fit["fits"]:
        click.echo(f"It could not be loaded now: {fit['why']}")
        return
    click.echo(f"If it were loaded now: {fit['why']}")
    context, cache, parallel = fit["context"], fit["kv_tokens"], fit["parallel"]
    click.echo(
        f"Context of {context:,} tokens, a cache of {cache:,} for {parallel} requests at a time"
    )
    click.echo()
    print_table(fit["devices"], _COLUMNS)


async def fit_here(config: Any, listed: Any, model: Any) -> Any:
    """The same for a box that does not run."""
    from pinaivu_box.devices import DeviceMonitor
    from pinaivu_box.gateway.fit_report import fit_of
    from pinaivu_box.gateway.placement import Placement
    from pinaivu_box.models.probe import Prober
    from pinaivu_box.settings import BoxSettings, LiveSettings

    async def no_digest(_: Any) -> str:
        return ""

    devices = DeviceMonitor()
    placement = Placement(LiveSettings(BoxSettings(config, listed)), no_digest, devices)
    try:
        return await fit_of(model, placement, config.engine, Prober())
    finally:
        await placement.close()
        devices.close()
