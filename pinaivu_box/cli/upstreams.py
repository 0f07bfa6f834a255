"""`pinaivu upstreams`: the other servers that serve models of the running box."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import UNKNOWN, Column


def _load(upstream: Any) -> str:
    return f"{upstream['running']}/{upstream['concurrency']} running, {upstream['waiting']} waiting"


def _speed(upstream: Any) -> str:
    if upstream["ttft_ms"] is None:
        return UNKNOWN
    return f"{upstream['ttft_ms']:,} ms, {upstream['tokens_per_s']:,} tokens/s"


_COLUMNS = (
    Column("NAME", itemgetter("name")),
    Column("STATE", itemgetter("state")),
    Column("MODELS", lambda upstream: ", ".join(upstream["models"]), cut="end"),
    Column("LOAD", _load, drop=3),
    Column("SPEED", _speed, drop=2),
    Column("WHY", lambda upstream: upstream["why"] or "", drop=4),
    Column("URL", itemgetter("url"), drop=1),
)


@click.command()
@standard_options(wide=True)
def upstreams(call: Call) -> None:
    """List the upstreams of the running box: servers that are no boxes ([[upstream]] in its
    configuration).

    SPEED is the median time to the first token, and that of one stream after it.
    """
    call.print_list(request(call.home, "/v1/admin/upstreams")["data"], _COLUMNS)
