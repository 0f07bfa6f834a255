"""`pinaivu ls` (models on disk) and `pinaivu ps` (engines of the running box)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import (
    ask_running,
    home_option,
    json_option,
    load_config,
    print_json,
)
from pinaivu_box.cli.tables import print_table, wide_option


@click.command()
@home_option
@json_option
@wide_option
@click.option("--config", "config_path", type=click.Path(path_type=Path, dir_okay=False))
def ls(home: Path, as_json: bool, wide: bool, config_path: Path | None) -> None:
    """List the models that a box on this home serves."""
    from pinaivu_box.models import catalog
    from pinaivu_box.models.names import printable

    found = catalog.load(load_config(home, config_path), home)
    if as_json:
        print_json(
            [
                {
                    "id": model.id,
                    "size": model.size,
                    "owner": model.owner,
                    "path": str(model.path),
                    "files": [str(file.path) for file in model.files],
                }
                for model in found.models
            ]
        )
    else:
        rows = [(m.id, f"{m.size / 1e6:,.0f} MB", m.owner, _where(m)) for m in found.models]
        print_table(
            ("MODEL", "SIZE", "OWNER", "FILE"),
            rows,
            cut={"FILE": "front"},
            spared=("FILE", "OWNER"),
            wide=wide,
        )
    for path, why in found.not_served.items():
        click.echo(f"not served: {printable(str(path))}: {why}", err=True)


def _where(model: Any) -> str:
    from pinaivu_box.models.names import printable

    more = f" and {len(model.parts) - 1} more" if model.parts else ""
    return printable(str(model.path)) + more


@click.command()
@home_option
@json_option
@wide_option
def ps(home: Path, as_json: bool, wide: bool) -> None:
    """List the engines of the box that runs on this home, with memory and load."""
    engines = ask_running(home, "/v1/engines")["data"]
    if as_json:
        print_json(engines)
        return
    rows = [
        (
            engine["model"],
            engine["state"],
            str(engine["pid"] or ""),
            f"{(engine['memory'] or 0) / 1e6:,.0f} MB",
            f"{engine['running']} running, {engine['waiting']} waiting",
            f"{engine['kv_used']:,}/{engine['kv_tokens']:,} tokens, {engine['kv_cached']:,} kept",
            engine["device"] or "",
        )
        for engine in engines
    ]
    print_table(
        ("MODEL", "STATE", "PID", "MEMORY", "LOAD", "KV CACHE", "DEVICE"),
        rows,
        spared=("DEVICE", "KV CACHE", "PID", "MEMORY", "LOAD"),
        wide=wide,
    )
