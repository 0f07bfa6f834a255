"""`pinaivu ps`, `upstreams` and `reload`: the running box, what its models run on, its settings."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import UNKNOWN, Column
from pinaivu_box.engine.messages import CPU
from pinaivu_box.text import megabytes

_RELOAD_SECONDS = 300.0  # many large model files take many seconds to read
_EFFECTS = {
    "applied": "is in effect",
    "engines": "takes effect for engines that start from now on",
    "restart": "takes effect when the box is restarted",
}


def _name(engine: dict[str, Any]) -> str:
    """The model, with a number if it is a further engine of that model."""
    replica = engine["replica"]
    return f"{engine['model']} #{replica + 1}" if replica else str(engine["model"])


_ENGINE_COLUMNS = (
    Column("MODEL", _name),
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
    Column("BITS", lambda engine: _bits(engine), drop=6),
    Column("DEVICE", lambda engine: _devices(engine), drop=1),
)
_DEVICE_COLUMNS = (
    Column("DEVICE", itemgetter("name")),
    Column("NAME", itemgetter("description"), drop=3),
    Column("MEMORY", lambda device: megabytes(device["total"]), number=True),
    Column("FREE", lambda device: megabytes(device["free"]), number=True),
    Column("USED HERE", lambda device: megabytes(device["used"]), number=True),
    Column("OTHERS", lambda device: _megabytes(device["others"]), drop=1, number=True),
    Column("LOAD", lambda device: _value(device["utilisation"], "%"), drop=2, number=True),
    Column("TEMPERATURE", lambda device: _value(device["temperature"], "°C"), drop=4, number=True),
    Column("POWER", lambda device: _value(device["power"], "W"), drop=5, number=True),
)


_WHY = (Column("MODEL", _name), Column("WHY", itemgetter("why")))


@click.command()
@standard_options(wide=True)
@click.option("--why", is_flag=True, help="Show why each engine is where it is.")
@click.option("--devices", is_flag=True, help="List the devices instead.")
def ps(call: Call, why: bool, devices: bool) -> None:
    """List the engines of the running box, with their memory, load and devices."""
    if devices:
        listed = request(call.home, "/v1/admin/devices")
        if listed["failure"] and not call.as_json:
            click.echo(f"The devices cannot be listed: {listed['failure']}.", err=True)
        call.print_list(listed["data"], _DEVICE_COLUMNS)
        return
    call.print_list(request(call.home, "/v1/engines")["data"], _WHY if why else _ENGINE_COLUMNS)


def _bits(engine: Mapping[str, Any]) -> str:
    """What is promised of them, and of which library for the CPU."""
    return f"{'exact' if engine['exactness'] else 'vary'} {engine['cpu_variant'] or ''}".rstrip()


def _devices(engine: Mapping[str, Any]) -> str:
    """The GPUs with what the engine takes there, or the maker's name of the CPU."""
    taken = [
        (each["device"], each["weights"] + each["cache"] + each["compute"])
        for each in engine["devices"]
    ]
    if len(taken) < 2:  # the machine's memory is a column of its own
        return engine["device"] or ""
    return ", ".join(f"{name} {megabytes(size)}" for name, size in taken if name != CPU)


def _megabytes(size: int | None) -> str:
    return "" if size is None else megabytes(size)


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.0f} {unit}"


def _places(upstream: Any) -> str:
    return f"{upstream['running']}/{upstream['concurrency']} running, {upstream['waiting']} waiting"


def _speed(upstream: Any) -> str:
    if upstream["ttft_ms"] is None:
        return UNKNOWN
    return f"{upstream['ttft_ms']:,} ms, {upstream['tokens_per_s']:,} tokens/s"


_UPSTREAM_COLUMNS = (
    Column("NAME", itemgetter("name")),
    Column("STATE", itemgetter("state")),
    Column("MODELS", lambda upstream: ", ".join(upstream["models"]), cut="end"),
    Column("LOAD", _places, drop=3),
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
    call.print_list(request(call.home, "/v1/admin/upstreams")["data"], _UPSTREAM_COLUMNS)


@click.command()
@standard_options()
def reload(call: Call) -> None:
    """Let the running box read its configuration again; no request is interrupted."""
    answer = request(call.home, "/v1/admin/reload", method="POST", seconds=_RELOAD_SECONDS)
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
