"""The checks in order; an exception in one of them is a failed check, never a traceback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from pinaivu_box.config import Config
from pinaivu_box.doctor import (
    graphics,
    machine,
    models,
    network,
    other_logs,
    receipt_log,
    relay,
    service,
    transcripts,
    upstreams,
)
from pinaivu_box.doctor import home as homes
from pinaivu_box.doctor.check import Check, of_error
from pinaivu_box.errors import BoxError, CliError
from pinaivu_box.models import catalog
from pinaivu_box.settings import read_shared_prefixes

Examiner = Callable[[], Check | Iterable[Check]]


def examine(
    home: Path, load: Callable[[], Config], starting: Callable[[str], None]
) -> Iterator[Check]:
    """Run all checks.

    `load` reads the configuration, and may raise CliError; `starting` is called with the name of
    each check before it begins.
    """
    starting("configuration")
    config, check = _configuration(load)
    folder = catalog.directory(config, home)
    examiners: list[tuple[str, Examiner]] = [
        ("home", partial(homes.permissions, home)),
        ("disk", partial(machine.disk, home, folder)),
        ("clock", partial(machine.clock, home, time.time())),
        ("processors", partial(machine.processors, home)),
        ("configuration", lambda: check),
        ("port", partial(machine.port, home, config)),
        ("TLS", partial(network.tls, config, home)),
        ("proxies", partial(network.proxies, config)),
        ("sign-on", partial(network.sign_on, config)),
        ("identity", partial(homes.identity, home)),
        ("database", partial(homes.database, home)),
        ("log", partial(receipt_log.whole, home)),
        ("transcripts", partial(transcripts.all_of, home)),
        ("others' logs", partial(other_logs.examine, home)),
        ("models", partial(models.files, config, home)),
        ("memory", partial(models.room, config, home)),
        ("engine", partial(models.engine, config, home)),
        ("peering", machine.links),
        ("relay", partial(relay.configured, config)),
        ("upstream", partial(upstreams.configured, config)),
        ("GPU", graphics.gpus),
        ("service", partial(service.installed, home)),
    ]
    for name, examiner in examiners:
        starting(name)
        yield from _guarded(name, examiner)


def _configuration(load: Callable[[], Config]) -> tuple[Config, Check]:
    """The configuration and its check; if it is not valid, the defaults for the other checks."""
    name = "configuration"
    config = Config()
    try:
        config = load()
        read_shared_prefixes(config.engine)
        return config, Check(name, "ok", "valid")
    except CliError as error:
        finding = error.message.removesuffix(".")
        return config, Check(name, "failed", finding, "sample.toml documents all settings")
    except OSError as error:
        finding = f"the file cannot be read: {error.strerror}"
        return Config(), Check(name, "failed", finding, "check the permissions of the home")


def _guarded(name: str, examiner: Examiner) -> Iterator[Check]:
    try:
        checks = examiner()
        yield from [checks] if isinstance(checks, Check) else checks
    except BoxError as error:
        yield of_error(name, error.message)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield Check(
            name, "failed", f"{where}{error.strerror}", "check the permissions and the owner"
        )
    except Exception as error:
        finding = f"the check itself failed: {type(error).__name__}: {error}"
        yield Check(name, "failed", finding, "please report it")
