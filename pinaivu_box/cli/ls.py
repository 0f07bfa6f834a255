"""`pinaivu ls`: the models of a box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.models.names import printable
from pinaivu_box.text import megabytes


def _files(model: Any) -> str:
    more = f" and {len(model.parts) - 1} more" if model.parts else ""
    return printable(str(model.path)) + more


_COLUMNS = (
    Column("MODEL", attrgetter("id")),
    Column("SIZE", lambda model: megabytes(model.size)),
    Column("OWNER", attrgetter("owner"), drop=2),
    Column("FILE", _files, drop=1, cut="start"),
)
_UPSTREAM_COLUMNS = (
    Column("UPSTREAM", attrgetter("name")),
    Column("MODELS", lambda upstream: ", ".join(upstream.models), cut="end"),
    Column("URL", attrgetter("url"), drop=1),
)
_ALIAS_COLUMNS = (
    Column("ALIAS", itemgetter(0)),
    Column("MODEL", itemgetter(1)),
)


@click.command()
@standard_options(config=True, wide=True)
def ls(call: Call) -> None:
    """List the models that a box on this home serves.

    What an upstream has under names with * is known to the running box: 'pinaivu upstreams'.
    """
    from pinaivu_box.models import catalog_loader

    config = call.config()
    listed = catalog_loader.load(config, call.home)
    if call.as_json:
        models = [_model(model, listed.aliases) for model in listed.models]
        print_json([*models, *_of_upstreams(config.upstream, listed.aliases)])
    else:
        print_table(listed.models, _COLUMNS, wide=call.wide)
        if aliases := listed.aliases.items():
            click.echo()
            print_table(aliases, _ALIAS_COLUMNS, wide=call.wide)
        if config.upstream:
            click.echo()
            print_table(config.upstream, _UPSTREAM_COLUMNS, wide=call.wide)
    for path, reason in listed.not_served.items():
        click.echo(f"not served: {printable(str(path))}: {reason}", err=True)


def _of_upstreams(upstreams: Sequence[Any], aliases: Any) -> Iterator[dict[str, Any]]:
    """Those that the configuration names."""
    for upstream in upstreams:
        for name in upstream.models:
            if "*" not in name:
                yield {
                    "id": name,
                    "size": 0,
                    "owner": "upstream",
                    "path": upstream.url,
                    "files": [],
                    "aliases": aliases.of(name),
                }


def _model(model: Any, aliases: Any) -> dict[str, Any]:
    return {
        "id": model.id,
        "size": model.size,
        "owner": model.owner,
        "path": str(model.path),
        "files": [str(file.path) for file in model.files],
        "aliases": aliases.of(model.id),
    }
