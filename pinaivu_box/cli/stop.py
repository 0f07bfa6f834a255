"""`pinaivu stop`: unloads models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options

_SECONDS = 60.0  # an engine that does not end is killed before


@click.command()
@standard_options()
@click.argument(
    "names", nargs=-1, shell_complete=suggestions.models, required=True, metavar="NAME..."
)
def stop(call: Call, names: tuple[str, ...]) -> None:
    """Unload models from the memory of the running box.

    Requests that run are not cancelled: the model is unloaded after them.  The next request loads
    it again.
    """
    unloaded = []
    for name in names:
        answer = request(
            call.home,
            "/v1/admin/models/unload",
            method="POST",
            body={"model": name},
            seconds=_SECONDS,
        )
        answer.pop("request_id", None)
        unloaded.append(answer)
        if not call.as_json:
            _print(answer)
    if call.as_json:
        call.print(unloaded, _print)


def _print(answer: Mapping[str, Any]) -> None:
    name, count = answer["model"], answer["running"]
    if not answer["unloaded"]:
        click.echo(f"{name} is not loaded.")
    elif count:
        requests = "request" if count == 1 else "requests"
        click.echo(f"{name} serves {count} {requests}, and is unloaded after that.")
    else:
        click.echo(f"{name} is unloaded.")
