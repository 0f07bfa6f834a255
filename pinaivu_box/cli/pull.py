"""`pinaivu pull` and `search`: models from registries, URLs, this machine or another box."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import click
import msgspec

from pinaivu_box.cli import colours, suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import stream
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.text import megabytes

# Another box may have to read a large file twice before it answers.
_PULL_SECONDS = 660.0
_KNOWN_COLUMNS = (
    Column("NAME", attrgetter("name")),
    Column("PURPOSE", attrgetter("purpose"), drop=1),
    Column("SIZE", lambda model: megabytes(model.size), number=True),
    Column("MEMORY", lambda model: megabytes(model.memory), number=True),
    Column("LICENSE", attrgetter("license"), drop=2),
)


_HUB_COLUMNS = (
    Column("NAME", attrgetter("name")),
    Column("PARAMETERS", lambda model: _billions(model.parameters), number=True),
    Column("DOWNLOADS", lambda model: f"{model.downloads:,}", number=True, drop=1),
    Column("LICENSE", attrgetter("license"), drop=2),
    Column("", lambda model: "gated" if model.gated else "", drop=3),
)


@click.command()
@standard_options()
@click.argument("model", shell_complete=suggestions.known_models)
@click.option(
    "--from", "source", metavar="PEER|any", default="", help="Copy it from this peer, or from any."
)
@click.option("--digest", default="", help="The beginning of the SHA-256 of the file.")
@click.option("--as", "name", metavar="NAME", help="Name of the model on this box.")
def pull(call: Call, model: str, source: str, digest: str, name: str | None) -> None:
    """Download MODEL and serve it.

    MODEL is a name of Ollama's registry (llama3.2:1b, USER/NAME:TAG), a repository of the Hugging
    Face Hub (hf.co/OWNER/REPO:QUANT), of any OCI registry (HOST/PATH/NAME:TAG), the URL of a .gguf
    file, or the path of one on this machine, which is served where it is.  With --from it is copied
    from another box of the network.  'pinaivu search' lists models that are known to work.

    An interrupted download continues where it stopped.  With --json, each line of the output is the
    progress as JSON.
    """
    reference = model if source else reference_of(model)
    body = {"model": reference, "from": source, "digest": digest.lower()}
    if name is not None:
        body["as"] = name
    last = pulled(call, body)
    if not call.as_json:
        _print_result(last)


def reference_of(model: str) -> str:
    """What the box is asked for: it may have another working directory than the command."""
    is_path = Path(model).suffix == ".gguf" and "://" not in model
    return str(Path(model).absolute()) if is_path else model


def pulled(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """Have the running box pull a model, with a bar or as lines of JSON; returns the last line.
    Raises CliError."""
    lines = stream(call.home, "/v1/admin/models/pull", body, _PULL_SECONDS)
    last: dict[str, Any] = {}
    for last in lines if call.as_json else _with_bar(lines, body["model"]):
        if call.as_json:
            click.echo(msgspec.json.encode(last).decode())
    if last.get("state") != "done":
        raise CliError(last.get("message") or "The box stopped: start it, and pull again.")
    return last


class PullBar:
    """A bar on a terminal that shows the lines of a pull."""

    def __init__(self, model: str) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        console = colours.console(stderr=True)
        self._bar = progress.Progress(*columns, console=console, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(f"{model} asking", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        name = f"{line['model']} {line['state']}"
        self._bar.update(self._task, description=name, total=line["size"], completed=line["bytes"])


def _with_bar(lines: Iterator[Any], model: str) -> Iterator[Any]:
    """The lines, while a bar on a terminal shows what they say."""
    with PullBar(model) as bar:
        for line in lines:
            bar.show(line)
            yield line


def _print_result(last: dict[str, Any]) -> None:
    sources = last["sources"]
    for source in sources:
        if source["left_out"]:
            click.echo(f"not used: {source['name']}: {source['left_out']}", err=True)
    origins = [f"{megabytes(s['bytes'])} from {s['name']}" for s in sources if s["bytes"]]
    summary = ", ".join(origins) or megabytes(last["size"])
    click.echo(last["message"] or f"{last['model']} is served: {summary}")
    if last["license"]:
        click.echo(f"License: {last['license']} ('pinaivu show {last['model']} --license')")


@click.command()
@standard_options(config=True, wide=True)
@click.argument("words", nargs=-1)
@click.option("--hub", is_flag=True, help="Ask the Hugging Face Hub: it is sent the WORDS.")
def search(call: Call, words: tuple[str, ...], hub: bool) -> None:
    """List models that are known to work, smallest first; WORDS select by name, purpose or licence.

    MEMORY is with a context of 8,192 tokens.  'pinaivu pull NAME' downloads one.  With --hub, the
    repositories with GGUF files on the Hugging Face Hub whose names have the WORDS, the most
    downloaded first.  Ollama's library has no search for programs.
    """
    if hub:
        _search_hub(call, " ".join(words))
        return
    from pinaivu_box.models import known_models

    found = known_models.search(" ".join(words))
    if call.as_json:
        print_json([{**msgspec.structs.asdict(model), "memory": model.memory} for model in found])
    else:
        print_table(found, _KNOWN_COLUMNS, wide=call.wide)


def _search_hub(call: Call, words: str) -> None:
    """Raises UsageError, PullFailed."""
    if not words.strip():
        raise UsageError("Nothing to search for: name some words.")
    from pinaivu_box.registry import hub_search

    found = asyncio.run(hub_search.search(words, call.config().registry))
    if call.as_json:
        print_json([msgspec.structs.asdict(model) for model in found])
    else:
        print_table(found, _HUB_COLUMNS, wide=call.wide)


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters else ""
