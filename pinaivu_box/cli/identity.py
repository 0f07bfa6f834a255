"""`pinaivu id`: the identity of this box."""

from __future__ import annotations

from pathlib import Path

import click

from pinaivu_box.cli.home import own_node
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_json
from pinaivu_box.errors import CliError
from pinaivu_box.identity import NODE_PREFIX


@click.command("id")
@standard_options()
def show(home: Path, as_json: bool) -> None:
    """Print the public key of this box (64 hex digits), which verifies its receipts.

    The id of the box is node_ followed by this key.
    """
    node_id = own_node(home)
    if not node_id:
        raise CliError(f"The box on {home} has no key yet: the first 'pinaivu serve' creates it.")
    key = node_id.removeprefix(NODE_PREFIX)
    if as_json:
        print_json({"node_id": node_id, "node_key": key})
    else:
        click.echo(key)
