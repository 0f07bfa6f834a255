"""`pinaivu id`: the identity of this box."""

from __future__ import annotations

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.errors import CliError
from pinaivu_box.identity import NODE_PREFIX


@click.command("id")
@standard_options()
def show(call: Call) -> None:
    """Print the public key of this box (64 hex digits), which verifies its receipts.

    The id of the box is node_ followed by this key.
    """
    node_id = call.node_id()
    if not node_id:
        raise CliError(
            f"The box on {call.home} has no key yet: the first 'pinaivu serve' creates it."
        )
    identity = {"node_id": node_id, "node_key": node_id.removeprefix(NODE_PREFIX)}
    call.print(identity, lambda identity: click.echo(identity["node_key"]))
