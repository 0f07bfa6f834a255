"""`pinaivu reload`: the running box reads its configuration and its models folder again."""

from __future__ import annotations

from typing import Any

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options

_SECONDS = 300.0  # many large model files take many seconds to read
_EFFECTS = {
    "applied": "is in effect",
    "engines": "takes effect for engines that start from now on",
    "restart": "takes effect when the box is restarted",
}


@click.command()
@standard_options()
def reload(call: Call) -> None:
    """Let the running box read its configuration again; no request is interrupted."""
    answer = request(call.home, "/v1/admin/reload", method="POST", seconds=_SECONDS)
    call.print(answer, _print_changes)


def _print_changes(answer: dict[str, Any]) -> None:
    for kind, effect in _EFFECTS.items():
        for name in answer[kind]:
            click.echo(f"{name} {effect}")
    if not any(answer[kind] for kind in _EFFECTS):
        click.echo("no setting has changed")
    click.echo(f"models: {', '.join(answer['models']) or 'none'}")
    for file in answer["not_served"]:
        click.echo(f"not served: {file['path']}: {file['reason']}", err=True)
