"""`pinaivu bench`: measure any OpenAI-compatible server, or two against each other."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import msgspec

from pinaivu_box.bench.compare import BenchRun, prepare, run_turn, turns
from pinaivu_box.bench.plot import svg
from pinaivu_box.bench.report import document, notes, rows
from pinaivu_box.bench.run import RunPlan, Tenant
from pinaivu_box.bench.target import BenchTarget
from pinaivu_box.bench.workload import Lengths, Workload
from pinaivu_box.cli import colours
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import own_server_context
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.config import default_home
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.text import number

_ONE = click.IntRange(min=1)
_ZERO = click.IntRange(min=0)
_FILE = click.Path(path_type=Path, dir_okay=False)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_REQUESTS_PER_CLIENT = 4  # of a closed loop, without --requests and --seconds
_REQUESTS = 100  # of an open loop
_PAIRS = 5


@click.command(context_settings={"show_default": True})
@click.argument("urls", nargs=-1, required=True, metavar="URL [URL]")
@standard_options(home=False)
@click.option("--plot", type=_FILE, help="Write the distributions to this file, as SVG.")
@click.option("--clients", type=_ONE, help="Closed loop: number of clients.  [default: 1]")
@click.option("--rate", type=_POSITIVE, help="Open loop: requests per second, a Poisson process.")
@click.option("--requests", type=_ONE, help="Number of requests.  [default: 4 per client]")
@click.option("--seconds", type=_POSITIVE, help="Duration; no request begins after it.")
@click.option("--warmup", type=_ZERO, default=1, help="Requests before those that are measured.")
@click.option("--prompt-tokens", default="128", metavar="LENGTH", help="Length of the prompts.")
@click.option("--output-tokens", default="64", metavar="LENGTH", help="Length of the answers.")
@click.option("--ignore-eos", is_flag=True, help="Send ignore_eos: answers have full length.")
@click.option("--shared-prefix", type=_ZERO, default=0, help="Tokens of a common system prompt.")
@click.option(
    "--intruder", type=_ZERO, default=0, help="Tokens of one long prompt amid the others."
)
@click.option("--tenants", metavar="NAME:CLIENTS[:KEY],…", help="Groups of clients with own keys.")
@click.option("--repetitive", is_flag=True, help="Prompts whose answers repeat their text.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sent with every request.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Sent with every request.")
@click.option("--model", help="Model.  [default: the first that the server lists]")
@click.option("--key", help="API key.  [env: PINAIVU_API_KEY]")
@click.option("--body", default="{}", metavar="JSON", help="Additional fields of every request.")
@click.option("--model2", help="--model for the second server.")
@click.option("--key2", help="--key for the second server.  [default: --key]")
@click.option("--body2", metavar="JSON", help="--body for the second server.  [default: --body]")
@click.option("--pairs", type=_ONE, help=f"Runs against each of two servers.  [default: {_PAIRS}]")
@click.option("--seed", default="0", help="Seed of the prompts.")
@click.option("--timeout", type=_POSITIVE, default=600.0, help="Seconds per request.")
def bench(call: Call, urls: tuple[str, ...], plot: Path | None, **options: Any) -> None:
    """Measure any OpenAI-compatible server with streamed chat requests, or compare two.

    URL is http://host:port or http://host:port/v1.  LENGTH is a number of tokens: 128,
    uniform:64-256 or lognormal:MEDIAN,SIGMA.  Two servers get the same requests, in the order A B,
    B A, A B, …; the ratios first/second are medians over the pairs.

    What arrives in one read counts as one arrival; a gap is the time between two arrivals.  Proxies
    are not used.  Exits with 1 if no request succeeded.
    """
    if len(urls) > 2:
        raise UsageError("Give one URL, or two to compare.")
    if options["pairs"] and len(urls) == 1:
        raise UsageError("--pairs needs two URLs.")
    started_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    plan = _plan(options)
    pairs = (options["pairs"] or _PAIRS) if len(urls) > 1 else 1
    targets, plan, runs = asyncio.run(_measure(_targets(urls, options), plan, pairs))
    if plot:
        _write_plot(plot, targets, runs)
    _print(targets, plan, runs, started_at if call.as_json else None)
    if not any(run.summary.requests for run in runs):
        raise CliError("No request succeeded.")


async def _measure(
    targets: list[BenchTarget], plan: RunPlan, pairs: int
) -> tuple[list[BenchTarget], RunPlan, list[BenchRun]]:
    """Run the plan; the returned targets and plan are complete with what the servers say.

    On a terminal, standard error shows the requests of the run and the speed of completed runs.
    """
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.completed:.0f} requests"),
        progress.TimeElapsedColumn(),
    )
    console = colours.console(stderr=True)
    terminal = sys.stderr.isatty()
    runs = []
    # Drawn rarely: drawing must not disturb the measurement.
    with progress.Progress(
        *columns, console=console, refresh_per_second=2, transient=True, disable=not terminal
    ) as bar:
        task = bar.add_task("asking the server", total=None)
        targets, plan = await prepare(targets, plan)
        for pair, number in turns(len(targets), pairs):
            name = f"pair {pair + 1}/{pairs}: {targets[number].url}" if len(targets) > 1 else "run"
            bar.reset(task, total=plan.requests, description=name)
            run = await run_turn(targets, plan, pair, number, lambda: bar.advance(task))
            runs.append(run)
            if len(targets) > 1 and terminal:
                console.print(f"{name}: {run.summary.tokens_per_s:,.1f} tokens/s")
    return targets, plan, runs


def _print(
    targets: list[BenchTarget], plan: RunPlan, runs: list[BenchRun], started_at: str | None
) -> None:
    """`started_at` (RFC 3339) is for JSON; without it a table is printed."""
    if started_at:
        print_json(document(targets, plan, runs, started_at))
    else:
        urls = [target.url for target in targets]
        titles = ("MEDIAN", *urls, "RATIO") if len(urls) > 1 else ("", *urls)
        columns = [Column(title, itemgetter(n), number=n > 0) for n, title in enumerate(titles)]
        print_table(rows(targets, runs), columns)
    for note in notes(targets, runs):
        click.echo(f"pinaivu: {note}", err=True)


def _write_plot(path: Path, targets: list[BenchTarget], runs: list[BenchRun]) -> None:
    try:
        path.write_text(svg(targets, runs))
    except OSError as error:
        raise CliError(f"The plot {path} cannot be written: {error.strerror}.") from error


# -- options -------------------------------------------------------------------------------------


def _plan(options: dict[str, Any]) -> RunPlan:
    closed = options["rate"] is None
    if not closed and (options["clients"] or options["tenants"] or options["intruder"]):
        raise UsageError(
            "--rate (open loop) cannot be used with --clients, --tenants or --intruder."
        )
    if options["clients"] and options["tenants"]:
        raise UsageError("--tenants already has the number of clients: remove --clients.")
    tenants: tuple[Tenant, ...] = (Tenant("", options["clients"] or 1),)
    if options["tenants"]:
        tenants = tuple(map(_tenant, options["tenants"].split(",")))
    if len({tenant.name for tenant in tenants}) < len(tenants):
        raise UsageError("--tenants has a name twice.")
    requests = options["requests"]
    if requests is None and options["seconds"] is None:
        clients = sum(tenant.clients for tenant in tenants)
        requests = _REQUESTS_PER_CLIENT * clients if closed else _REQUESTS
    workload = Workload(
        prompt=Lengths.parse(options["prompt_tokens"], "--prompt-tokens"),
        output=Lengths.parse(options["output_tokens"], "--output-tokens"),
        **{name: options[name] for name in ("seed", "shared_prefix", "repetitive")},
    )
    others = ("rate", "seconds", "warmup", "intruder", "timeout")
    return RunPlan(workload, tenants, requests=requests, **{name: options[name] for name in others})


def _tenant(text: str) -> Tenant:
    name, _, rest = text.partition(":")
    clients, _, key = rest.partition(":")
    if not name or "." in name or not (count := number(clients)):
        raise UsageError(
            f"--tenants: '{text}' is not NAME:CLIENTS[:KEY], such as light:1:sk-pnv-…."
        )
    return Tenant(name, count, key or None)


def _targets(urls: tuple[str, ...], options: dict[str, Any]) -> list[BenchTarget]:
    key = options["key"] or os.environ.get("PINAIVU_API_KEY", "")
    keys = (key, key if options["key2"] is None else options["key2"])
    models = (options["model"], options["model2"])
    second = options["body"] if options["body2"] is None else options["body2"]
    bodies = (_fields(options["body"], "--body"), _fields(second, "--body2"))
    sampling = {
        "temperature": options["temperature"],
        "top_p": options["top_p"],
        "ignore_eos": options["ignore_eos"] or None,
    }
    common = {name: value for name, value in sampling.items() if value is not None}
    return [
        BenchTarget.parse(
            url,
            key=keys[n],
            model=models[n] or "",
            fields={**common, **bodies[n]},
            tls=own_server_context(default_home(), url),
        )
        for n, url in enumerate(urls)
    ]


def _fields(text: str, option: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UsageError(f"{option} is not a JSON object: {error}.") from error
