"""`pinaivu pull`: copies a model from other boxes, through the running one, which has the links."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from pinaivu_box.cli.home import follow_running, home_option
from pinaivu_box.errors import CliError

# Another box may have to read a large file twice before it answers.
_SECONDS = 660.0


@click.command()
@home_option
@click.argument("model")
@click.option(
    "--from", "source", metavar="PEER|any", required=True, help="A peer; any: all that have it."
)
@click.option("--digest", default="", help="Which file, by the beginning of its SHA-256.")
@click.option("--as", "name", metavar="NAME", help="What to call it here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line now and then.")
def pull(home: Path, model: str, source: str, digest: str, name: str | None, as_json: bool) -> None:
    """Copy MODEL from another box of the network, and serve it.

    What was cut off goes on where it was.
    """
    body = {"model": model, "from": source, "digest": digest.lower()}
    if name is not None:
        body["as"] = name
    lines = follow_running(home, "/v1/admin/models/pull", body, _SECONDS)
    last = _told(lines) if as_json else _drawn(lines, model)
    if last.get("state") != "done":
        raise CliError(last.get("message") or "The box has stopped: start it and pull again.")
    if not as_json:
        _say(last)


def _told(lines: Iterator[Any]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for last in lines:
        click.echo(msgspec.json.encode(last).decode())
    return last


def _drawn(lines: Iterator[Any], model: str) -> dict[str, Any]:
    """With a bar, where somebody looks at it."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    last: dict[str, Any] = {}
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{model} asking", total=None)
        for last in lines:
            bar.update(
                task,
                description=f"{last['model']} {last['state']}",
                total=last["size"],
                completed=last["bytes"],
            )
    return last


def _say(last: dict[str, Any]) -> None:
    for source in last["sources"]:
        if source["left_out"]:
            click.echo(f"left out {source['name']}: {source['left_out']}", err=True)
    came = [f"{s['bytes'] / 1e6:,.0f} MB from {s['name']}" for s in last["sources"] if s["bytes"]]
    size = f"{last['size'] / 1e6:,.0f} MB"
    click.echo(last["message"] or f"{last['model']} is served: {', '.join(came) or size}")
