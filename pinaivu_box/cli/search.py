"""`pinaivu search`: models that are known to work, or that the Hub has."""

from __future__ import annotations

import asyncio
from operator import attrgetter

import click
import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.errors import UsageError
from pinaivu_box.text import megabytes

_COLUMNS = (
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
        print_table(found, _COLUMNS, wide=call.wide)


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
