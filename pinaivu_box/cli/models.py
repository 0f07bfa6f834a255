"""`pinaivu ls` (models on disk), `pinaivu ps` (engines of the running box) and `pinaivu pull`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from typing import Any

import click
import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request, stream
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.errors import CliError
from pinaivu_box.models.names import printable
from pinaivu_box.text import megabytes

# Another box may have to read a large file twice before it answers.
_PULL_SECONDS = 660.0


def _files(model: Any) -> str:
    more = f" and {len(model.parts) - 1} more" if model.parts else ""
    return printable(str(model.path)) + more


_MODEL_COLUMNS = (
    Column("MODEL", attrgetter("id")),
    Column("SIZE", lambda model: megabytes(model.size)),
    Column("OWNER", attrgetter("owner"), drop=2),
    Column("FILE", _files, drop=1, cut="start"),
)
_ENGINE_COLUMNS = (
    Column("MODEL", itemgetter("model")),
    Column("STATE", itemgetter("state")),
    Column("PID", lambda engine: str(engine["pid"] or ""), drop=3),
    Column("MEMORY", lambda engine: megabytes(engine["memory"] or 0), drop=4),
    Column(
        "LOAD", lambda engine: f"{engine['running']} running, {engine['waiting']} waiting", drop=5
    ),
    Column(
        "KV CACHE",
        lambda engine: (
            f"{engine['kv_used']:,}/{engine['kv_tokens']:,} tokens, {engine['kv_cached']:,} cached"
        ),
        drop=2,
    ),
    Column("DEVICE", lambda engine: engine["device"] or "", drop=1),
)


@click.command()
@standard_options(config=True, wide=True)
def ls(call: Call) -> None:
    """List the models that a box on this home serves."""
    from pinaivu_box.models import catalog

    listed = catalog.load(call.config(), call.home)
    if call.as_json:
        print_json([_model(model) for model in listed.models])
    else:
        print_table(listed.models, _MODEL_COLUMNS, wide=call.wide)
    for path, reason in listed.not_served.items():
        click.echo(f"not served: {printable(str(path))}: {reason}", err=True)


def _model(model: Any) -> dict[str, Any]:
    return {
        "id": model.id,
        "size": model.size,
        "owner": model.owner,
        "path": str(model.path),
        "files": [str(file.path) for file in model.files],
    }


@click.command()
@standard_options(wide=True)
def ps(call: Call) -> None:
    """List the engines of the running box, with their memory and load."""
    call.print_list(request(call.home, "/v1/engines")["data"], _ENGINE_COLUMNS)


@click.command()
@standard_options()
@click.argument("model")
@click.option(
    "--from", "source", metavar="PEER|any", required=True, help="The peer; any: all that have it."
)
@click.option("--digest", default="", help="The beginning of the SHA-256 of the file.")
@click.option("--as", "name", metavar="NAME", help="Name of the model on this box.")
def pull(call: Call, model: str, source: str, digest: str, name: str | None) -> None:
    """Copy MODEL from another box of the network, and serve it.

    An interrupted copy continues where it stopped.  With --json, each line of the output is the
    progress as JSON.
    """
    body = {"model": model, "from": source, "digest": digest.lower()}
    if name is not None:
        body["as"] = name
    lines = stream(call.home, "/v1/admin/models/pull", body, _PULL_SECONDS)
    last: dict[str, Any] = {}
    for last in lines if call.as_json else _with_bar(lines, model):
        if call.as_json:
            click.echo(msgspec.json.encode(last).decode())
    if last.get("state") != "done":
        raise CliError(last.get("message") or "The box stopped: start it, and pull again.")
    if not call.as_json:
        _print_result(last)


def _with_bar(lines: Iterator[Any], model: str) -> Iterator[Any]:
    """The lines, while a bar on a terminal shows what they say."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{model} asking", total=None)
        for line in lines:
            name = f"{line['model']} {line['state']}"
            bar.update(task, description=name, total=line["size"], completed=line["bytes"])
            yield line


def _print_result(last: dict[str, Any]) -> None:
    sources = last["sources"]
    for source in sources:
        if source["left_out"]:
            click.echo(f"not used: {source['name']}: {source['left_out']}", err=True)
    origins = [f"{megabytes(s['bytes'])} from {s['name']}" for s in sources if s["bytes"]]
    summary = ", ".join(origins) or megabytes(last["size"])
    click.echo(last["message"] or f"{last['model']} is served: {summary}")
