"""`pinaivu show`: what is known of a model."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_fields, print_table
from pinaivu_box.errors import CliError, NotRunning
from pinaivu_box.models.names import printable
from pinaivu_box.text import megabytes

_MEMORY_COLUMNS = (
    Column("CONTEXT", lambda need: f"{need['context']:,}", number=True),
    Column("MEMORY", lambda need: megabytes(need["bytes"]), number=True),
)
_FIT_COLUMNS = (
    Column("DEVICE", itemgetter("device")),
    Column("LAYERS", lambda part: str(part["layers"]), number=True),
    Column("WEIGHTS", lambda part: megabytes(part["weights"]), drop=2, number=True),
    Column("KV CACHE", lambda part: megabytes(part["cache"]), drop=2, number=True),
    Column("BUFFERS", lambda part: megabytes(part["compute"]), drop=2, number=True),
    Column("OTHER", lambda part: megabytes(part["other"]), drop=3, number=True),
    Column("IN ALL", lambda part: megabytes(part["total"]), number=True),
    Column("FREE NOW", lambda part: megabytes(part["free"]), drop=1, number=True),
    Column("LEFT", lambda part: megabytes(part["left"]), number=True),
)
_INDENT = " " * len("Quantisation  ")


@click.command()
@standard_options(config=True)
@click.argument("model", shell_complete=suggestions.models)
@click.option("--license", "license_", is_flag=True, help="Print the text of its licence instead.")
@click.option("--fit", is_flag=True, help="Show where it would go now, and what would be left.")
def show(call: Call, model: str, license_: bool, fit: bool) -> None:
    """Show what is known of MODEL: an id, or an alias.

    MEMORY is what one engine takes with a context of so many tokens.
    """
    described = description_of(call, model, fit=fit)
    if license_ and not call.as_json:
        click.echo(license_text(described))
        return
    call.print(described["fit"] or described, _print_fit if described["fit"] else print_description)


def description_of(call: Call, model: str, *, fit: bool = False) -> dict[str, Any]:
    """What the running server says of a model, or the files of a box that does not run.  Raises
    CliError, ModelNotFound."""
    try:
        body = {"model": model, "fit": fit}
        answer: dict[str, Any] = request(
            call.home, "/v1/admin/models/show", method="POST", body=body
        )
    except NotRunning:
        answer = asyncio.run(_read(call, model, fit))
    answer.pop("request_id", None)
    return answer


async def _read(call: Call, name: str, fit: bool) -> dict[str, Any]:
    """Raises CliError, ModelNotFound."""
    import msgspec

    from pinaivu_box.models import catalog_loader
    from pinaivu_box.models.description import describe

    config = call.config()
    listed = catalog_loader.load(config, call.home)
    model = listed.find(listed.aliases.target_of(name) or name)
    described = describe(model, config, listed.aliases, await _digest(call.home, model))
    if fit:
        where = await _fit_here(config, listed, model)
        described = msgspec.structs.replace(described, fit=where)
    answer: dict[str, Any] = msgspec.to_builtins(described)
    return answer


def _print_fit(fit: Mapping[str, Any]) -> None:
    """Print where the model would go."""
    if not fit["fits"]:
        click.echo(f"It could not be loaded now: {fit['why']}")
        return
    click.echo(f"If it were loaded now: {fit['why']}")
    context, cache, parallel = fit["context"], fit["kv_tokens"], fit["parallel"]
    click.echo(
        f"Context of {context:,} tokens, a cache of {cache:,} for {parallel} requests at a time"
    )
    click.echo()
    print_table(fit["devices"], _FIT_COLUMNS)


async def _fit_here(config: Any, listed: Any, model: Any) -> Any:
    """Where it would go on a box that does not run."""
    from pinaivu_box.devices import DeviceMonitor
    from pinaivu_box.gateway.fit_report import fit_of
    from pinaivu_box.gateway.placement import Placement
    from pinaivu_box.models.probe import Prober
    from pinaivu_box.settings import BoxSettings, LiveSettings

    async def no_digest(_: Any) -> str:
        return ""

    devices = DeviceMonitor()
    placement = Placement(LiveSettings(BoxSettings(config, listed)), no_digest, devices)
    try:
        return await fit_of(model, placement, config.engine, Prober())
    finally:
        await placement.close()
        devices.close()


async def _digest(home: Path, model: Any) -> str:
    """That of the model, where it is known without reading its files."""
    from pinaivu_box.files.store import Digests
    from pinaivu_box.home import database_of

    if not (home / "pinaivu.db").exists():
        return model.recorded_digest or ""
    async with database_of(home) as database:
        return await Digests(database).known(model)


def license_text(described: Mapping[str, Any]) -> str:
    """Raises CliError."""
    if text := str(described["license_text"]):
        lines = text.rstrip().splitlines()
        return "\n".join(printable(line.expandtabs(), 10_000) for line in lines)
    name, source = described["license"], described["source"]
    if not name:
        raise CliError(f"Nothing is known of the licence of {described['model']}.")
    where = f": see {source}" if source else ""
    return f"{name} (its text did not come with the model{where})"


def print_description(described: Mapping[str, Any]) -> None:
    print_fields({name: text for name, text in _fields(described).items() if text})
    if needs := described["memory"]:
        click.echo()
        print_table(needs, _MEMORY_COLUMNS)


def _fields(described: Mapping[str, Any]) -> dict[str, str]:
    settings = described["settings"]
    return {
        "Model": described["model"],
        "Aliases": ", ".join(described["aliases"]),
        "Source": described["source"],
        "Owner": described["owner"],
        "Architecture": described["architecture"],
        "Parameters": _parameters(described),
        "Quantisation": described["quantisation"],
        "Context": _context(described),
        "Template": described["template"],
        "Projector": described["projector"],
        "System": _line(described["system"]),
        "Stop": ", ".join(map(repr, described["stop"])),
        "License": _license_field(described),
        "Size": megabytes(described["size"]) if described["size"] else "",
        "Digest": described["digest"] or "not known: the file has not been read yet",
        "File": f"\n{_INDENT}".join(described["files"]),
        "Settings": _wrapped([f"{name} {_text(value)}" for name, value in _set(settings)]),
        "Set here": _wrapped([f"{name} {_text(value)}" for name, value in _overrides(described)]),
    }


def _parameters(described: Mapping[str, Any]) -> str:
    count, active = described["parameters"], described["active_parameters"]
    if not count:
        return ""
    used = f", of which a token uses {_count(active)}" if active != count else ""
    return _count(count) + used


def _count(number: int) -> str:
    if number >= 10**9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.0f} M" if number >= 10**6 else f"{number:,}"


def _context(described: Mapping[str, Any]) -> str:
    longest = described["context_length"]
    return f"{described['context']:,} tokens, of at most {longest:,}" if longest else ""


def _license_field(described: Mapping[str, Any]) -> str:
    name = printable(described["license"]) or ("unnamed" if described["license_text"] else "")
    more = f"  ('pinaivu show {described['model']} --license')" if described["license_text"] else ""
    return f"{name}{more}" if name else "unknown"


def _line(text: str) -> str:
    first = printable(" ".join(text.split()), 1000)
    return first if len(first) <= 60 else f"{first[:59]}…"


def _wrapped(parts: list[str]) -> str:
    """The parts in as many lines as a terminal needs."""
    lines = textwrap.wrap(", ".join(parts), 80 - len(_INDENT), break_long_words=False)
    return f"\n{_INDENT}".join(lines)


def _set(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings that say something, those of sampling and prices each by its own name."""
    shown = {name: value for name, value in settings.items() if name != "context"}
    sampling, price = shown.pop("sampling", {}), shown.pop("price", {})
    prices = {f"price of {name} tokens": value for name, value in price.items() if value != "0"}
    every = {**shown, **prices, **sampling}
    return [
        (name, value) for name, value in every.items() if value not in (None, "", [], (), False)
    ]


def _overrides(described: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those of the settings that an operator set ('pinaivu set')."""
    shown = dict(described["overrides"])
    sampling = shown.pop("sampling", {})
    return [*shown.items(), *sampling.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
