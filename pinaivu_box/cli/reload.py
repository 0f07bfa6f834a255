"""`pinaivu reload`: the running box reads its configuration and its models folder again."""

from __future__ import annotations

from pathlib import Path

import click

from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_json

_SECONDS = 300.0  # many large model files take many seconds to read
_EFFECTS = {
    "applied": "is in effect",
    "engines": "takes effect for engines that start from now on",
    "restart": "takes effect when the box is restarted",
}


@click.command()
@standard_options()
def reload(home: Path, as_json: bool) -> None:
    """Let the running box read its configuration again; no request is interrupted."""
    answer = request(home, "/v1/admin/reload", method="POST", seconds=_SECONDS)
    if as_json:
        print_json(answer)
        return
    for kind, effect in _EFFECTS.items():
        for name in answer[kind]:
            click.echo(f"{name} {effect}")
    if not any(answer[kind] for kind in _EFFECTS):
        click.echo("no setting has changed")
    click.echo(f"models: {', '.join(answer['models']) or 'none'}")
    for file in answer["not_served"]:
        click.echo(f"not served: {file['path']}: {file['reason']}", err=True)
