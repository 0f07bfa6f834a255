"""`pinaivu serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pinaivu_box.cli import first_model
from pinaivu_box.cli.addresses import is_local, login_url, other_urls, url_of
from pinaivu_box.cli.banner import banner, describe_devices
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.chat.server import KEY_NAME
from pinaivu_box.cli.client import Running, write_running
from pinaivu_box.cli.options import standard_options
from pinaivu_box.config import LOG_FORMATS, LOG_LEVELS, Config, ModelConfig
from pinaivu_box.errors import UsageError

if TYPE_CHECKING:
    from pinaivu_box.box import Box

log = logging.getLogger("pinaivu.serve")

_MAX_NOT_SERVED = 20  # files that are named at the start


@click.command()
@standard_options(json=False, config=True)
@click.option("--host", help="Listen address; 0.0.0.0 serves the LAN.  [env: PINAIVU_HOST]")
@click.option("--port", type=int, help="Listen port.  [env: PINAIVU_PORT; default: 4001]")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=PATH",
    help="Also serve this GGUF file.  Repeatable.",
)
@click.option(
    "--peering", is_flag=True, default=None, help="Connect to the other boxes of a network."
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="[default: info]")
@click.option("--log-format", type=click.Choice(LOG_FORMATS), help="[default: text]")
def serve(call: Call, models: tuple[str, ...], **options: Any) -> None:
    """Serve the API until Ctrl-C or SIGTERM."""
    overrides = {
        ("server", "host"): options["host"],
        ("server", "port"): options["port"],
        ("peering", "enabled"): options["peering"],
        ("log", "level"): options["log_level"],
        ("log", "format"): options["log_format"],
    }
    call = Call(call.home.expanduser().absolute(), call.config_file and call.config_file.absolute())
    extra = [_model(text) for text in models]
    load = partial(call.config, overrides=overrides, extra_models=extra)
    wanted = first_model.offer(load(), call.home)
    asyncio.run(_serve(load, call.home, wanted=wanted))


@click.command("chat-server", hidden=True)
@standard_options(json=False, config=True)
def chat_server(call: Call) -> None:
    """Serve the API on a free port of this machine until standard input ends: a child process of a
    chat in the terminal, which has a key already."""
    load = partial(
        call.config,
        overrides={("server", "host"): "127.0.0.1", ("server", "port"): 0},
    )
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    asyncio.run(_serve(load, call.home, first_key=False))


def _stop_at_end_of_input() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _model(text: str) -> ModelConfig:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise UsageError(f"--model {text} is not NAME=PATH, for example tiny:1b=/models/tiny.gguf.")
    return ModelConfig(name=name, path=path)


def _banner_of(box: Box, port: int, secret: str | None, devices: str, link: str) -> str:
    server = box.first_config.server
    certificate = box.settings.current.certificate
    return banner(
        url_of(server, port),
        box.home,
        [model.id for model in box.catalog.models],
        secret,
        devices,
        others=other_urls(server, port),
        on_lan=not is_local(server),
        fingerprint=certificate.fingerprint if certificate else "",
        self_signed=certificate.cert if certificate and server.tls else None,
        link=link,
    )


async def _serve(
    load: Callable[[], Config], home: Path, *, first_key: bool = True, wanted: str = ""
) -> None:
    """`wanted` is a model to pull before."""
    from pinaivu_box import logs, startup
    from pinaivu_box.box import not_served_in
    from pinaivu_box.box_services import open_box
    from pinaivu_box.server.serve import bind
    from pinaivu_box.server.serve import serve as serve_box
    from pinaivu_box.server.supervision import Supervision
    from pinaivu_box.systemd.journal import is_journal
    from pinaivu_box.systemd.notify import Notifier

    notifier = Notifier.from_environment()
    config = load()
    logs.configure(config.log)
    # What is printed would stay in a journal that many may read.
    private = not is_journal(1)
    # First: if the address is in use, no key must be left in the home that nobody has seen.
    listener = bind(config.server.host, config.server.port)
    try:
        async with Supervision(notifier) as supervision, open_box(load, home) as box:
            if wanted:
                await first_model.pull(box, wanted)
            port = listener.getsockname()[1]
            secret = await _first_key(box.database) if first_key and private else None
            link = await _first_link(box, login_url(config.server, port)) if first_key else ""
            devices = await describe_devices(box.devices)

            def started() -> None:
                startup.end()
                local = url_of(config.server, port, to_print=False)
                write_running(home, Running(os.getpid(), local, box.control_token))
                _print_not_served(not_served_in(box.catalog))
                if private:
                    click.echo(_banner_of(box, port, secret, devices, link))
                    return
                names = ", ".join(model.id for model in box.catalog.models)
                fields = {"url": url_of(config.server, port), "models": names}
                log.info("serving", extra={"fields": fields})

            try:
                await serve_box(box, listener, started, _stopping, supervision)
            finally:
                (home / "run.json").unlink(missing_ok=True)
        _say("Goodbye.")
    finally:
        listener.close()


def _print_not_served(files: Sequence[Any]) -> None:
    for file in files[:_MAX_NOT_SERVED]:
        click.echo(f"pinaivu: not served: {file.path}: {file.reason}.", err=True)
    if (more := len(files) - _MAX_NOT_SERVED) > 0:
        click.echo(f"pinaivu: {more} more files are not served: see 'pinaivu ls'.", err=True)


def _stopping(running: int) -> None:
    wait = ""
    if running:
        requests, them = ("request", "it") if running == 1 else ("requests", "them")
        wait = f" Waiting for {running} {requests}; press Ctrl-C again to end {them} now."
    _say(f"\nStopping.{wait}")


def _say(text: str) -> None:
    """Print on a terminal only: standard output is for scripts, and a log for machines."""
    if os.isatty(2):
        # Unbuffered: a buffer could not be flushed at the exit if the terminal was closed.
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


async def _first_link(box: Any, url: str) -> str:
    """The link for the first login, to print; "" where an admin can log in already, or where the
    output is no terminal: it would stay in a log."""
    from pinaivu_box.store import accounts, login_links
    from pinaivu_box.store.audit import BOX

    if not os.isatty(1) or await accounts.admin_can_log_in(box.database):
        return ""
    owner = await accounts.find(box.database, accounts.OWNER)
    _, token = await login_links.create(box.database, owner, BOX)
    return f"{url}/login/link/{token}"


async def _first_key(database: Any) -> str | None:
    from pinaivu_box.policy import ADMIN_SCOPES, Policy
    from pinaivu_box.store import accounts, keys, new_keys
    from pinaivu_box.store.audit import Actor

    if await keys.exist(database, beside=KEY_NAME):
        return None
    draft = new_keys.Draft("first key", accounts.OWNER, Policy(scopes=ADMIN_SCOPES))
    _, secret = await new_keys.create(database, draft, Actor("first start", "local"))
    return secret
